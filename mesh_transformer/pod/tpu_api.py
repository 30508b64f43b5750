"""The Cloud TPU API of one zone: every call has a deadline, and what may pass is tried again.

The client's methods have neither time-outs nor retries of their own; here are both. What remains
is one of three: a `UserError`, which somebody has to mend; `NoCapacity`; `ConnectionError`.

All calls are of the API's version v2 but one: only v2alpha1 can put a reserved slice in a queue.
The request ids of its CreateNode are not needed: after a reply that was lost the second CreateNode
is answered with ALREADY_EXISTS, and what exists is adopted.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Literal, NamedTuple

from mesh_transformer import schema
from mesh_transformer.errors import UserError

logger = logging.getLogger(__name__)

LOCAL = "local"
"""A zone for tests and emulators: an address in the environment stands for Google Cloud."""
ENDPOINT = "MESH_TRANSFORMER_TPU_ENDPOINT"

CALL_SECONDS = 30.0
OUTAGE_SECONDS = 300.0
METADATA = "169.254.169.254"
"""The address of the metadata server, which every VM of Google Cloud has."""
SECRETS = "https://secretmanager.googleapis.com/v1"
SCOPE = "https://www.googleapis.com/auth/cloud-platform"

Kind = Literal["node", "queued_resource"]
_FOLDERS: dict[Kind, str] = {"node": "nodes", "queued_resource": "queuedResources"}


class NoCapacity(OSError):
    """A slice cannot be had now: quota, no capacity, or not in time. It may be had later."""


class _Google(NamedTuple):
    v2: ModuleType
    v2alpha1: ModuleType
    exceptions: ModuleType


def _google() -> _Google:
    # By itself gRPC starts its threads anew in a forked child, where they abort it now and then
    # before it becomes the program it is to be: in an eighth of its starts Ray lost a process of
    # its own so, and waited for it in vain. Read once, as gRPC is imported, which is here: nothing
    # else of the driver uses it before.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"
    try:
        from google.api_core import exceptions
        from google.cloud import tpu_v2, tpu_v2alpha1
    except ImportError as error:
        raise UserError(
            'creating TPU VMs needs more packages: pip install -e ".[pods]" -c constraints.txt'
        ) from error
    return _Google(tpu_v2, tpu_v2alpha1, exceptions)


def connect(
    zone: str,
    project: str | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> TpuApi:
    """Connect to a zone with Application Default Credentials.

    The zone "local" is for tests and emulators: the server that MESH_TRANSFORMER_TPU_ENDPOINT
    names (host:port) is asked, in the clear and without credentials.

    Raises:
        UserError: packages, credentials or a project are missing.
    """
    modules = _google()
    if zone == LOCAL:
        clients, found = _local_clients(modules), LOCAL
    else:
        clients, found = _cloud_clients(modules)
    if not (project or found):
        raise UserError("the credentials name no project; set tpu_project in the configuration")
    return TpuApi(*clients, zone=zone, project=project or found, clock=clock, sleep=sleep)


def _local_clients(modules: _Google) -> tuple[Any, Any]:
    if not os.environ.get(ENDPOINT):
        raise UserError(f"--tpu_region {LOCAL} is for emulators, one of which {ENDPOINT} must name")
    import grpc

    channel = grpc.insecure_channel(os.environ[ENDPOINT])

    def client(version: ModuleType) -> Any:
        transport = version.TpuClient.get_transport_class("grpc")
        return version.TpuClient(transport=transport(host="localhost", channel=channel))

    return client(modules.v2), client(modules.v2alpha1)


def _cloud_clients(modules: _Google) -> tuple[tuple[Any, Any], str]:
    import google.auth

    try:
        credentials, project = google.auth.default(scopes=[SCOPE])
    except google.auth.exceptions.DefaultCredentialsError as error:
        raise UserError(
            "no credentials of Google Cloud are found; to log in: gcloud auth "
            "application-default login"
        ) from error
    client = modules.v2.TpuClient(credentials=credentials)
    return (client, modules.v2alpha1.TpuClient(credentials=credentials)), project or ""


class TpuApi:
    """The calls that creating and watching slices takes.

    Attributes:
        clock: Seconds, from any beginning.
        sleep: Waits for seconds.
    """

    def __init__(
        self,
        client: Any,
        alpha: Any,
        *,
        zone: str,
        project: str,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._client, self._alpha = client, alpha
        self._exceptions = _google().exceptions
        self.zone, self.project = zone, project
        self.clock, self.sleep = clock, sleep

    @property
    def parent(self) -> str:
        return f"projects/{self.project}/locations/{self.zone}"

    def own_address(self) -> str:
        """Return the IP address that this machine has where the zone's VMs are.

        Raises:
            UserError: It has none.
        """
        there = os.environ[ENDPOINT].rpartition(":")[0] if self.zone == LOCAL else METADATA
        with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
            try:
                probe.connect((there, 80))  # sends nothing, but chooses a way
            except OSError as error:
                raise UserError(
                    f"this machine has no network by which TPU VMs could reach it ({error}); set "
                    "tpu_driver_address to its address in theirs"
                ) from error
            address: str = probe.getsockname()[0]
            return address

    def secret(self, name: str) -> str:
        """Read the newest version of a secret in Secret Manager.

        Raises:
            UserError: There is none, or the user may not read it.
            OSError: Google Cloud cannot be reached.
        """
        import google.auth
        from google.auth.transport.requests import AuthorizedSession

        path = f"projects/{self.project}/secrets/{name}/versions/latest"
        try:
            credentials, _ = google.auth.default(scopes=[SCOPE])
            session = AuthorizedSession(credentials)
            answer = session.get(f"{SECRETS}/{path}:access", timeout=CALL_SECONDS)
        except google.auth.exceptions.GoogleAuthError as error:
            raise UserError(
                f"Google Cloud does not let in who asks for tpu_token_secret ({error}); log in: "
                "gcloud auth application-default login"
            ) from error
        if answer.status_code != 200:
            raise UserError(
                f"tpu_token_secret {name!r} cannot be read (HTTP {answer.status_code}); make it "
                f"in project {self.project}, and give who runs this and tpu_service_account the "
                "role roles/secretmanager.secretAccessor"
            )
        return base64.b64decode(answer.json()["payload"]["data"]).decode().strip()

    def get(self, kind: Kind, name: str) -> Any | None:
        """Return a node or queued resource; None if there is none of this name."""
        try:
            return self._call(f"get_{kind}", {"name": self._path(kind, name)})
        except self._exceptions.NotFound:
            return None

    def list_all(self, kind: Kind) -> list[Any]:
        return self._call(f"list_{kind}s", {"parent": self.parent})

    def create(
        self, kind: Kind, name: str, body: Mapping[str, Any], *, alpha: bool = False
    ) -> str | None:
        """Ask for a node or queued resource; None if it exists.

        Returns:
            The operation that creates it; see `failure`.

        Raises:
            UserError: Something about it is wrong.
            NoCapacity: It cannot be had now.
        """
        request = {"parent": self.parent, f"{kind}_id": name, kind: body}
        e = self._exceptions
        try:
            return self._call(f"create_{kind}", request, alpha=alpha).operation.name
        except e.AlreadyExists:
            return None
        except (e.NotFound, e.Conflict, e.FailedPrecondition) as error:
            raise self._meaning(error) from error

    def delete(self, kind: Kind, name: str) -> None:
        """Ask for a deletion."""
        force = {"force": True} if kind == "queued_resource" else {}  # its node goes with it
        self._ask(f"delete_{kind}", {"name": self._path(kind, name)} | force)

    def start(self, name: str) -> None:
        """Ask for a node that was stopped to be started."""
        self._ask("start_node", {"name": self._path("node", name)})

    def set_metadata(self, name: str, key: str, value: str) -> bool:
        """Ask for an entry of a node's metadata; False if it is to be asked for again."""
        node = self.get("node", name)
        if node is None:
            return False
        changed = {"name": node.name, "metadata": dict(node.metadata) | {key: value}}
        return self._ask("update_node", {"node": changed, "update_mask": {"paths": ["metadata"]}})

    def _ask(self, method: str, request: dict[str, Any]) -> bool:
        """Make a call that another operation may be in the way of, or the lack of its object."""
        e = self._exceptions
        try:
            self._call(method, request)
        except (e.NotFound, e.Conflict, e.FailedPrecondition) as error:
            logger.info("Cloud TPU does not take %s now: %s", method, error.message)
            return False
        return True

    def failure(self, operation: str) -> UserError | NoCapacity | None:
        """What made an operation fail; None if it is under way or has succeeded."""
        try:
            status = self._call("get_operation", {"name": operation}).error
        except self._exceptions.NotFound:  # operations are forgotten after a while
            return None
        return self.refusal(status.code, status.message) if status.code else None

    def refusal(self, code: int, message: str) -> UserError | NoCapacity:
        """What a google.rpc.Status means to who asked for a slice."""
        import grpc

        known = {status.value[0]: status for status in grpc.StatusCode}
        error = self._exceptions.from_grpc_status(known.get(code, grpc.StatusCode.UNKNOWN), message)
        return self._meaning(error)

    def check(self, tpu_type: str, runtime: str) -> None:
        """Ask what the zone offers.

        Raises:
            UserError: There is no such zone, or it has no such accelerator type or runtime.
        """
        _must_have(f"--tpu_region {self.zone!r} is no zone of Cloud TPU", self.zone, self._zones())
        for flaw, wanted, method, field in (
            (
                f"tpu_type {tpu_type!r} (v3-TPU_SIZE unless given) is not offered in {self.zone}",
                *(tpu_type, "list_accelerator_types", "type_"),
            ),
            (
                f"tpu_runtime {runtime!r} is not offered in {self.zone}",
                *(runtime, "list_runtime_versions", "version"),
            ),
        ):
            offers = self._call(method, {"parent": self.parent})
            _must_have(flaw, wanted, [getattr(offer, field) for offer in offers])

    def _zones(self) -> list[str]:
        zones: list[str] = []
        page = ""
        while True:
            request = {"name": f"projects/{self.project}", "page_token": page}
            answer = self._call("list_locations", request)
            zones += [location.location_id for location in answer.locations]
            if not (page := answer.next_page_token):
                return zones

    def _path(self, kind: Kind, name: str) -> str:
        return f"{self.parent}/{_FOLDERS[kind]}/{name}"

    def _call(self, method: str, request: dict[str, Any], *, alpha: bool = False) -> Any:
        """Make one call, again and again for up to five minutes where the API does not answer."""
        e = self._exceptions
        passing: tuple[Any, ...] = (e.ServiceUnavailable, e.DeadlineExceeded)
        if method.startswith(("get_", "list_")):
            passing += (e.ResourceExhausted,)  # the quota of requests, not that of TPUs
        call = getattr(self._alpha if alpha else self._client, method)
        began, pause = self.clock(), 1.0
        while True:
            try:
                answer = call(request=request, timeout=CALL_SECONDS, retry=None)
                return list(answer) if hasattr(answer, "pages") else answer
            except passing as error:
                if "invalid_grant" in error.message or "Reauthentication" in error.message:
                    raise self._meaning(e.Unauthenticated(error.message)) from error  # for good
                if self.clock() - began > OUTAGE_SECONDS:
                    raise ConnectionError(
                        f"Cloud TPU has not answered {method} for {OUTAGE_SECONDS:.0f} s: "
                        f"{error.message}"
                    ) from error
                logger.info("Cloud TPU does not answer %s yet: %s", method, error.message)
            except (e.NotFound, e.Conflict, e.FailedPrecondition):
                raise  # who calls knows what they mean
            except e.GoogleAPICallError as error:
                raise self._meaning(error) from error
            self.sleep(pause)
            pause = min(2 * pause, 30.0)

    def _meaning(self, error: Any) -> UserError | NoCapacity:
        e = self._exceptions
        if not isinstance(error, e.ClientError) or isinstance(
            error, (e.TooManyRequests, e.Conflict, e.Cancelled)
        ):
            return NoCapacity(f"{self.zone}: {error.message}")
        if isinstance(error, e.Unauthorized):
            advice = "log in again: gcloud auth application-default login"
        elif isinstance(error, e.Forbidden):
            advice = (
                f"who runs this needs the role roles/tpu.admin in project {self.project} (the key "
                "tpu_project), and roles/iam.serviceAccountUser for tpu_service_account"
            )
        else:
            advice = "see the keys tpu_... of the configuration"
        return UserError(f"Google Cloud refuses: {error.message.rstrip('.')}; {advice}")


def _must_have(flaw: str, wanted: str, offers: list[str]) -> None:
    if wanted not in offers:
        raise UserError(f"{flaw}{schema.did_you_mean(wanted, offers)}")
