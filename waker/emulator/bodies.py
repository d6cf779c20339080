"""The bodies that the Machines API takes, field by field (the OpenAPI file's schemas; Fly docs: machines-resource)."""

from .shapes import (
    SIGNALS,
    STOP_SIGNALS,
    Shape,
    anything,
    autostop,
    duration,
    flag,
    integer,
    list_of,
    map_of,
    number,
    one_of,
    record,
    seconds,
    signal_of,
    text,
)

__all__ = ["BODIES"]

WORDS = list_of(text)
CHECK_HEADERS = list_of(record(name=text, values=WORDS))
STOP_CONFIG = record(signal=signal_of(STOP_SIGNALS), timeout=duration)
RESTART = record(policy=one_of("no", "always", "on-failure", "spot-price"), max_retries=integer, gpu_bid_price=number)
FILE = record(guest_path=text, raw_value=text, secret_name=text, image_config=text, mode=integer)
SECRET = record(env_var=text, name=text)
ENV_FROM = record(env_var=text, field_ref=one_of("id", "version", "app_name", "private_ip", "region", "image"))
GUEST = record(
    cpu_kind=text,
    cpus=integer,
    memory_mb=integer,
    max_memory_mb=integer,
    gpu_kind=text,
    gpus=integer,
    host_dedication_id=text,
    kernel_args=WORDS,
    persist_rootfs=one_of("never", "always", "restart"),
)
SERVICE_CHECK_FIELDS: dict[str, Shape] = {
    "type": text,
    "port": integer,
    "interval": duration,
    "timeout": duration,
    "grace_period": duration,
    "method": text,
    "path": text,
    "protocol": text,
    "headers": CHECK_HEADERS,
    "tls_server_name": text,
    "tls_skip_verify": flag,
}
SERVICE = record(
    protocol=text,
    internal_port=integer,
    autostart=flag,
    autostop=autostop,
    min_machines_running=integer,
    concurrency=record(type=text, soft_limit=integer, hard_limit=integer),
    ports=list_of(
        record(
            port=integer,
            start_port=integer,
            end_port=integer,
            handlers=WORDS,
            force_https=flag,
            http_options=record(compress=flag, h2_backend=flag, headers_read_timeout=integer, idle_timeout=integer),
            proxy_proto_options=record(version=text),
            tls_options=record(alpn=WORDS, default_self_signed=flag, versions=WORDS),
        )
    ),
    checks=list_of(record(**SERVICE_CHECK_FIELDS)),
    force_instance_key=text,
    force_instance_description=text,
)
CONFIG = record(
    image=text,
    env=map_of(text),
    init=record(exec=WORDS, entrypoint=WORDS, cmd=WORDS, tty=flag, kernel_args=WORDS, swap_size_mb=integer),
    guest=GUEST,
    size=text,
    metadata=map_of(text),
    mounts=list_of(
        record(
            volume=text,
            path=text,
            name=text,
            encrypted=flag,
            size_gb=integer,
            extend_threshold_percent=integer,
            add_size_gb=integer,
            size_gb_limit=integer,
        )
    ),
    services=list_of(SERVICE),
    checks=map_of(record(kind=one_of("informational", "readiness"), **SERVICE_CHECK_FIELDS)),
    metrics=record(port=integer, path=text, https=flag),
    files=list_of(FILE),
    processes=list_of(
        record(
            exec=WORDS,
            entrypoint=WORDS,
            cmd=WORDS,
            user=text,
            env=map_of(text),
            env_from=list_of(ENV_FROM),
            secrets=list_of(SECRET),
            ignore_app_secrets=flag,
        )
    ),
    containers=list_of(anything),
    statics=list_of(anything),
    schedule=one_of("hourly", "daily", "weekly", "monthly"),
    auto_destroy=flag,
    restart=RESTART,
    stop_config=STOP_CONFIG,
    standbys=WORDS,
    dns=record(skip_registration=flag, nameservers=WORDS, searches=WORDS, hostname=text, hostname_fqdn=text),
    rootfs=record(persist=one_of("never", "always", "restart"), size_gb=integer),
    cache_drive=record(size_mb=integer),
    disable_machine_autostart=flag,
)
MACHINE = record(
    name=text,
    region=text,
    config=CONFIG,
    skip_launch=flag,
    skip_service_registration=flag,
    skip_secrets=flag,
    min_secrets_version=integer,
    lsvd=flag,
    lease_ttl=integer,
    current_version=text,
)
# PUT and PATCH: "null values and empty strings remove keys", so null must be seen.
METADATA = record(
    machine_version=text,
    updated_at=text,
    metadata=lambda value, where, notes: {
        text(name, where, notes): "" if each is None else text(each, f"{where}.{name}", notes)
        for name, each in anything(value, where, notes).items()
    },
)

# operation → the shape of its body, and whether there must be one.
BODIES: dict[str, tuple[Shape, bool]] = {
    # The docs call an app's name app_name, the OpenAPI file name.
    "Apps_create": (record(name=text, app_name=text, org_slug=text, network=text, enable_subdomains=flag), True),
    "App_IPAssignments_create": (
        record(type=text, network=text, region=text, org_slug=text, service_name=text),
        True,
    ),
    "Machines_create": (MACHINE, True),
    "Machines_update": (MACHINE, True),
    # flyctl sends the machine's id too, and "0s" for a timeout that was not set.
    "Machines_stop": (record(signal=signal_of(STOP_SIGNALS), timeout=seconds, id=text), False),
    "Machines_signal": (record(signal=signal_of(SIGNALS), id=text), True),
    "Machines_create_lease": (record(ttl=integer, description=text), False),
    "Machines_update_metadata": (METADATA, True),
    "Machines_upsert_metadata": (record(value=text, updated_at=text), True),
    "Machines_exec": (
        record(command=WORDS, cmd=text, stdin=text, timeout=integer, container=text, machine=anything),
        True,
    ),
    "Volumes_create": (
        record(
            name=text,
            region=text,
            size_gb=integer,
            encrypted=flag,
            fstype=text,
            auto_backup_enabled=flag,
            snapshot_retention=integer,
            snapshot_id=text,
            source_volume_id=text,
            require_unique_zone=flag,
            unique_zone_app_wide=flag,
            compute=GUEST,
            compute_image=text,
        ),
        True,
    ),
    "Volumes_update": (record(auto_backup_enabled=flag, snapshot_retention=integer), True),
    "Volumes_extend": (record(size_gb=integer), True),
}
