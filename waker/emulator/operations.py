"""The Machines API's operations: which request is which, what it is limited by, and which ones a lease protects.

Names, methods and paths are the OpenAPI file's. What is in the table and not in EMULATED is answered 501 by its name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote

__all__ = ["EMULATED", "LEASED", "Operation", "find"]

PREFIX = "v1"

# method, path below /v1, name
TABLE = """
GET    apps                                                  Apps_list
POST   apps                                                  Apps_create
GET    apps/{app}                                            Apps_show
DELETE apps/{app}                                            Apps_delete
GET    apps/{app}/certificates                               App_Certificates_list
POST   apps/{app}/certificates/acme                          App_Certificates_acme_create
POST   apps/{app}/certificates/custom                        App_Certificates_custom_create
GET    apps/{app}/certificates/{hostname}                    App_Certificates_show
DELETE apps/{app}/certificates/{hostname}                    App_Certificates_delete
DELETE apps/{app}/certificates/{hostname}/acme               App_Certificates_acme_delete
POST   apps/{app}/certificates/{hostname}/check              App_Certificates_check
DELETE apps/{app}/certificates/{hostname}/custom             App_Certificates_custom_delete
POST   apps/{app}/deploy_token                               App_create_deploy_token
GET    apps/{app}/ip_assignments                             App_IPAssignments_list
POST   apps/{app}/ip_assignments                             App_IPAssignments_create
DELETE apps/{app}/ip_assignments/{ip}                        App_IPAssignments_delete
GET    apps/{app}/machines                                   Machines_list
POST   apps/{app}/machines                                   Machines_create
GET    apps/{app}/machines/{machine}                         Machines_show
POST   apps/{app}/machines/{machine}                         Machines_update
DELETE apps/{app}/machines/{machine}                         Machines_delete
POST   apps/{app}/machines/{machine}/cordon                  Machines_cordon
GET    apps/{app}/machines/{machine}/events                  Machines_list_events
POST   apps/{app}/machines/{machine}/exec                    Machines_exec
GET    apps/{app}/machines/{machine}/lease                   Machines_show_lease
POST   apps/{app}/machines/{machine}/lease                   Machines_create_lease
DELETE apps/{app}/machines/{machine}/lease                   Machines_release_lease
GET    apps/{app}/machines/{machine}/memory                  Machines_get_memory
PUT    apps/{app}/machines/{machine}/memory                  Machines_set_memory_limit
POST   apps/{app}/machines/{machine}/memory/reclaim          Machines_reclaim_memory
GET    apps/{app}/machines/{machine}/metadata                Machines_show_metadata
PUT    apps/{app}/machines/{machine}/metadata                Machines_update_metadata
PATCH  apps/{app}/machines/{machine}/metadata                Machines_update_metadata
GET    apps/{app}/machines/{machine}/metadata/{key}          Machines_get_metadata_key
POST   apps/{app}/machines/{machine}/metadata/{key}          Machines_upsert_metadata
DELETE apps/{app}/machines/{machine}/metadata/{key}          Machines_delete_metadata
GET    apps/{app}/machines/{machine}/ps                      Machines_list_processes
POST   apps/{app}/machines/{machine}/restart                 Machines_restart
POST   apps/{app}/machines/{machine}/signal                  Machines_signal
POST   apps/{app}/machines/{machine}/start                   Machines_start
POST   apps/{app}/machines/{machine}/stop                    Machines_stop
POST   apps/{app}/machines/{machine}/suspend                 Machines_suspend
POST   apps/{app}/machines/{machine}/uncordon                Machines_uncordon
GET    apps/{app}/machines/{machine}/versions                Machines_list_versions
GET    apps/{app}/machines/{machine}/wait                    Machines_wait
GET    apps/{app}/secretkeys                                 Secretkeys_list
GET    apps/{app}/secretkeys/{secret}                        Secretkey_get
POST   apps/{app}/secretkeys/{secret}                        Secretkey_set
DELETE apps/{app}/secretkeys/{secret}                        Secretkey_delete
POST   apps/{app}/secretkeys/{secret}/decrypt                Secretkey_decrypt
POST   apps/{app}/secretkeys/{secret}/encrypt                Secretkey_encrypt
POST   apps/{app}/secretkeys/{secret}/generate               Secretkey_generate
POST   apps/{app}/secretkeys/{secret}/sign                   Secretkey_sign
POST   apps/{app}/secretkeys/{secret}/verify                 Secretkey_verify
GET    apps/{app}/secrets                                    Secrets_list
POST   apps/{app}/secrets                                    Secrets_update
GET    apps/{app}/secrets/{secret}                           Secret_get
POST   apps/{app}/secrets/{secret}                           Secret_create
DELETE apps/{app}/secrets/{secret}                           Secret_delete
GET    apps/{app}/volumes                                    Volumes_list
POST   apps/{app}/volumes                                    Volumes_create
GET    apps/{app}/volumes/{volume}                           Volumes_get_by_id
PUT    apps/{app}/volumes/{volume}                           Volumes_update
DELETE apps/{app}/volumes/{volume}                           Volume_delete
PUT    apps/{app}/volumes/{volume}/extend                    Volumes_extend
GET    apps/{app}/volumes/{volume}/snapshots                 Volumes_list_snapshots
POST   apps/{app}/volumes/{volume}/snapshots                 createVolumeSnapshot
GET    orgs/{org}/machines                                   Machines_org_list
GET    orgs/{org}/volumes                                    Volumes_org_list
POST   platform/placements                                   Platform_placements_post
GET    platform/regions                                      Platform_regions_get
POST   tokens/authenticate                                   Tokens_authenticate
POST   tokens/authorize                                      Tokens_authorize
GET    tokens/current                                        CurrentToken_show
POST   tokens/kms                                            Tokens_request_Kms
POST   tokens/oidc                                           Tokens_request_OIDC
"""

DONE_HERE = """
Apps_list Apps_create Apps_show Apps_delete
App_IPAssignments_list App_IPAssignments_create App_IPAssignments_delete
Machines_list Machines_create Machines_show Machines_update Machines_delete
Machines_start Machines_stop Machines_restart Machines_signal Machines_wait Machines_cordon Machines_uncordon
Machines_list_events Machines_list_versions Machines_exec
Machines_show_lease Machines_create_lease Machines_release_lease
Machines_show_metadata Machines_update_metadata
Machines_get_metadata_key Machines_upsert_metadata Machines_delete_metadata
Volumes_list Volumes_create Volumes_get_by_id Volumes_update Volume_delete Volumes_extend
"""
# While somebody holds the machine's lease, these need its nonce. Whether metadata and exec do is undocumented.
PROTECTED = """
Machines_update Machines_delete Machines_cordon Machines_uncordon Machines_restart Machines_signal
Machines_start Machines_stop Machines_suspend
"""
EMULATED = frozenset(DONE_HERE.split())
LEASED = frozenset(PROTECTED.split())


@dataclass(frozen=True, slots=True)
class Operation:
    """A request that the API knows: its name, and what stands in its path."""

    name: str
    path: Mapping[str, str]


def _parsed() -> list[tuple[str, tuple[str, ...], str]]:
    rows = (line.split() for line in TABLE.strip().splitlines())
    return [(method, tuple(path.split("/")), name) for method, path, name in rows]


ROWS = _parsed()


def find(method: str, path: str) -> Operation | tuple[str, ...]:
    """The operation; or the methods that this path knows, none if there is no such path."""
    segments = [unquote(segment) for segment in path.split("/")[1:]]
    if segments[:1] != [PREFIX]:
        return ()
    segments = segments[1:]
    methods = []
    for known, template, name in ROWS:
        if len(template) != len(segments):
            continue
        pairs = list(zip(template, segments, strict=True))
        if not all(word == segment if word[0] != "{" else segment for word, segment in pairs):
            continue
        if known == method:
            return Operation(name, {word[1:-1]: segment for word, segment in pairs if word[0] == "{"})
        methods.append(known)
    return tuple(methods)
