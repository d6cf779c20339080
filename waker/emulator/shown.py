"""Machines, apps, addresses and volumes the way the Machines API shows them (the OpenAPI file's schemas)."""

import hashlib
from collections.abc import Mapping
from itertools import islice
from typing import Any

from .cloud import App, Deployed, Volume
from .machine import Machine
from .states import State
from .world import World

__all__ = ["app", "config", "image_ref", "ip", "machine", "volume"]

EVENTS = 20
SUMMARY_OMITS = ("config", "checks", "events", "host_status", "nonce")
BLOCK = 4096
GUEST = {"cpu_kind": "shared", "cpus": 1, "memory_mb": 256}


def machine(world: World, deployed: Deployed, *, summary: bool = False) -> dict[str, Any]:
    """A machine as it is now. *nonce* is shown on create alone, by who made the lease."""
    life: Machine = deployed.machine
    shown: dict[str, Any] = {
        "id": life.id,
        "name": deployed.name,
        "state": str(life.state),
        "region": life.region,
        "image_ref": image_ref(deployed.config["image"]),
        "instance_id": life.version,
        "version": life.version,
        "private_ip": deployed.private_ip,
        "created_at": world.timestamp(deployed.created_at),
        "updated_at": world.timestamp(deployed.updated_at),
        "config": config(world, deployed.config),
        "events": [told.as_json() for told in islice(deployed.history, EVENTS)],
        "checks": [
            {
                "name": name,
                "status": "warning",
                "output": "the machine hasn't started"
                if life.state is not State.STARTED
                else "not emulated: checks are not run",
                "updated_at": world.timestamp(deployed.created_at),
            }
            for name in deployed.config.get("checks", {})
        ],
        "host_status": "ok",
        "cordoned": life.cordoned,
    }
    if world.strikes("host_unreachable", life.id):
        shown |= {"host_status": "unreachable", "incomplete_config": shown.pop("config")}
    return {name: value for name, value in shown.items() if name not in SUMMARY_OMITS} if summary else shown


def config(world: World, kept: Mapping[str, Any]) -> dict[str, Any]:
    """A config, with what the platform fills in."""
    shown = {"init": {}, "guest": GUEST, **kept}
    if "services" in shown and world.knobs.autostop_in_answers == "boolean":
        words = {"off": False, "stop": True}
        shown["services"] = [
            {name: words.get(value, value) if name == "autostop" else value for name, value in service.items()}
            for service in shown["services"]
        ]
    return shown


def image_ref(image: str) -> dict[str, Any]:
    """registry/repository:tag@digest, taken apart; without a digest, one that goes with the name."""
    name, _, digest = image.partition("@")
    first, slash, rest = name.partition("/")
    registry, repository = (first, rest) if slash and ("." in first or ":" in first) else ("registry-1.docker.io", name)
    if "/" not in repository and registry == "registry-1.docker.io":
        repository = f"library/{repository}"
    repository, _, tag = repository.partition(":")
    return {
        "registry": registry,
        "repository": repository,
        "tag": tag or "latest",
        "digest": digest or f"sha256:{hashlib.sha256(name.encode()).hexdigest()}",
        "labels": {},
    }


def app(each: App) -> dict[str, Any]:
    """An app."""
    machines = [life for life in each.machines.values() if life.state is not State.DESTROYED]
    return {
        "id": f"emulated{each.number:08d}",
        "internal_numeric_id": each.number,
        "name": each.name,
        "machine_count": len(machines),
        "volume_count": len(each.volumes),
        "network": each.network,
        "status": "deployed" if machines else "pending",
        "organization": {"name": each.org, "slug": each.org, "internal_numeric_id": 1},
    }


def ip(world: World, address: tuple[str, str, float]) -> dict[str, Any]:
    """An address of an app; what kind it is shows in the address alone."""
    where, kind, at = address
    return {
        "ip": where,
        "region": "global",
        "service_name": "",
        "shared": kind == "shared_v4",
        "created_at": world.timestamp(at),
    }


def volume(world: World, each: Volume) -> dict[str, Any]:
    """A volume."""
    blocks = each.size_gb * (1 << 30) // BLOCK
    return {
        "id": each.id,
        "name": each.name,
        "state": "created",
        "region": each.region,
        "zone": "emu1",
        "size_gb": each.size_gb,
        "encrypted": each.encrypted,
        "fstype": "ext4",
        "type": "local",
        "host_status": "ok",
        "attached_machine_id": each.machine or "",
        "attached_alloc_id": "",
        "auto_backup_enabled": each.auto_backup,
        "snapshot_retention": each.snapshot_retention,
        "block_size": BLOCK,
        "blocks": blocks,
        "blocks_avail": blocks,
        "blocks_free": blocks,
        "bytes_total": blocks * BLOCK,
        "bytes_used": 0,
        "created_at": world.timestamp(each.created_at),
    }
