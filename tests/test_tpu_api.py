"""How Google Cloud is reached, what is tried again, and what is refused before anything is made."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from tpu_slices import V3_16, StatusCode, Time, fake, make_vm, serve

from mesh_transformer.config import PodConfig
from mesh_transformer.errors import UserError
from mesh_transformer.pod import tpu_api
from mesh_transformer.pod.tpu_vm import NoCapacity, TpuVm, list_vms

auth: Any = pytest.importorskip("google.auth")
pytestmark = pytest.mark.pods


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with serve(monkeypatch) as server:
        yield server


@pytest.fixture
def time() -> Time:
    return Time()


def test_without_the_extra_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "google.cloud.tpu_v2", None)
    monkeypatch.delattr("google.cloud.tpu_v2")
    wanted = 'pip install -e "\\.\\[pods\\]" -c constraints'
    with pytest.raises(UserError, match=wanted):
        TpuVm("a", "local", PodConfig(tpu_type="v3-8"), spot=False, startup_script="")
    with pytest.raises(UserError, match=wanted):
        list_vms("us-central1-a")


def test_the_local_zone_needs_the_address_of_an_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tpu_api.ENDPOINT, raising=False)
    with pytest.raises(UserError) as caught:
        tpu_api.connect("local")
    assert str(caught.value) == (
        "--tpu_region local is for emulators, one of which MESH_TRANSFORMER_TPU_ENDPOINT must name"
    )


FORKS = """
import os
from mesh_transformer import driver
from mesh_transformer.pod import tpu_api

api = tpu_api.connect("local")
assert api.get("node", "a") is None
n_before = len(os.listdir("/proc/self/task"))
if os.fork() == 0:
    print(n_before, len(os.listdir("/proc/self/task")), flush=True)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at threads in /proc")
def test_a_driver_that_is_connected_starts_processes_without_threads_of_the_connection(
    cloud: Any,
) -> None:
    pytest.importorskip("ray")
    unset = {k: v for k, v in os.environ.items() if k != "GRPC_ENABLE_FORK_SUPPORT"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS],
        env=unset,
        capture_output=True,
        text=True,
        check=True,
    )
    parent, child = map(int, done.stdout.split())
    assert parent > 1, "gRPC has threads"
    assert child == 1


def test_who_is_not_logged_in_is_told_how(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(**_: object) -> None:
        raise auth.exceptions.DefaultCredentialsError("none")

    monkeypatch.setattr(auth, "default", nobody)
    with pytest.raises(UserError, match="to log in: gcloud auth application-default login"):
        tpu_api.connect("us-central1-a")


@pytest.mark.parametrize(
    ("found", "given", "project"),
    [("theirs", None, "theirs"), ("theirs", "mine", "mine"), (None, "mine", "mine")],
)
def test_the_project_is_that_of_the_credentials_unless_given(
    monkeypatch: pytest.MonkeyPatch, found: str | None, given: str | None, project: str
) -> None:
    from google.auth.credentials import AnonymousCredentials

    monkeypatch.setenv(tpu_api.ENDPOINT, "127.0.0.1:1")  # is for the zone "local" alone
    monkeypatch.setattr(auth, "default", lambda **_: (AnonymousCredentials(), found))
    api = tpu_api.connect("us-central1-a", given)
    assert api.parent == f"projects/{project}/locations/us-central1-a"
    assert api._client.api_endpoint == "tpu.googleapis.com"


def test_credentials_without_a_project_are_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    from google.auth.credentials import AnonymousCredentials

    monkeypatch.setattr(auth, "default", lambda **_: (AnonymousCredentials(), None))
    with pytest.raises(UserError, match="set tpu_project in the configuration"):
        tpu_api.connect("us-central1-a")


@pytest.mark.thorough
def test_after_a_lost_reply_the_slice_is_not_created_twice(cloud: Any, time: Time) -> None:
    for code in (StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED):
        cloud.faults["CreateNode"] = [fake.Fault(code, done=True)]
        assert make_vm(time).ensure().ready
        assert cloud.methods("CreateN") == ["CreateNode", "CreateNode"]
        make_vm(time).delete()
        cloud.calls.clear()


def test_errors_that_pass_are_tried_again_ever_later(cloud: Any, time: Time) -> None:
    failing = [fake.Fault(StatusCode.UNAVAILABLE)] * 7
    for method in ("ListLocations", "GetNode", "CreateNode", "GetOperation"):
        cloud.faults[method] = list(failing)
        time.sleeps.clear()
        assert make_vm(time).ensure().ready
        slept = "".join(f" {seconds:g}" for seconds in time.sleeps)
        assert " 1 2 4 8 16 30 30" in slept and not cloud.faults[method]
        make_vm(time).delete()


def test_too_many_requests_are_waited_for_but_too_many_slices_are_not(
    cloud: Any, time: Time
) -> None:
    exhausted = fake.Fault(StatusCode.RESOURCE_EXHAUSTED, "Quota exceeded")
    cloud.faults["GetNode"] = [exhausted] * 3
    cloud.faults["CreateNode"] = [exhausted]
    with pytest.raises(NoCapacity, match="^local: Quota exceeded$"):
        make_vm(time).ensure()
    assert make_vm(time).ensure().ready


def test_an_outage_ends_in_a_connection_error(cloud: Any, time: Time) -> None:
    cloud.faults["GetNode"] = [fake.Fault(StatusCode.UNAVAILABLE, "down")] * 100
    with pytest.raises(ConnectionError, match="not answered get_node for 300 s: down"):
        make_vm(time).state()
    assert 300 < time.now < 400


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (StatusCode.INVALID_ARGUMENT, "see the keys tpu_... of the configuration"),
        (StatusCode.FAILED_PRECONDITION, "see the keys tpu_... of the configuration"),
        (StatusCode.NOT_FOUND, "see the keys tpu_... of the configuration"),
        (StatusCode.UNAUTHENTICATED, "log in again: gcloud auth application-default login"),
        (
            StatusCode.PERMISSION_DENIED,
            "who runs this needs the role roles/tpu.admin in project my-project (the key "
            "tpu_project), and roles/iam.serviceAccountUser for tpu_service_account",
        ),
    ],
)
def test_a_refusal_is_not_tried_again(cloud: Any, time: Time, code: Any, advice: str) -> None:
    cloud.faults["CreateNode"] = [fake.Fault(code, "No.")]
    with pytest.raises(UserError) as caught:
        make_vm(time).ensure()
    assert str(caught.value) == f"Google Cloud refuses: No; {advice}"
    assert cloud.methods("CreateN") == ["CreateNode"] and not time.sleeps


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (
            PodConfig(tpu_type="v3-64"),
            "tpu_type 'v3-64' (v3-TPU_SIZE unless given) is not offered in local; did you mean "
            "'v3-16'?",
        ),
        (
            PodConfig(tpu_type="v3-8", tpu_runtime="tpu-ubuntu2204"),
            "tpu_runtime 'tpu-ubuntu2204' is not offered in local; did you mean "
            "'tpu-ubuntu2204-base'?",
        ),
    ],
)
def test_what_a_zone_does_not_offer_is_refused_before_anything_is_created(
    cloud: Any, time: Time, config: PodConfig, problem: str
) -> None:
    for deed in ("check", "ensure"):
        with pytest.raises(UserError) as caught:
            getattr(make_vm(time, config), deed)()
        assert str(caught.value) == problem
    assert not cloud.methods("Create")


@pytest.mark.parametrize(
    ("zone", "problem"),
    [
        (
            "europe-west4b",
            "--tpu_region 'europe-west4b' is no zone of Cloud TPU; did you mean 'europe-west4-b'?",
        ),
        (
            "us-central1",
            "--tpu_region 'us-central1' is no zone of Cloud TPU; did you mean 'us-central1-b'?",
        ),
        ("mars", "--tpu_region 'mars' is no zone of Cloud TPU"),
    ],
)
def test_a_zone_that_there_is_not_is_refused_with_the_closest_one(
    cloud: Any, time: Time, zone: str, problem: str
) -> None:
    vm = make_vm(time)
    vm._api.zone = zone
    with pytest.raises(UserError) as caught:
        vm.check()
    assert str(caught.value) == problem
    assert cloud.methods("") == ["ListLocations", "ListLocations"]


def test_who_may_not_ask_is_told_what_is_missing(cloud: Any, time: Time) -> None:
    denied = fake.Fault(StatusCode.PERMISSION_DENIED, "Cloud TPU API has not been used before.")
    cloud.faults["ListLocations"] = [denied]
    with pytest.raises(UserError, match="has not been used before; who runs this needs the role"):
        make_vm(time).ensure()
    assert cloud.methods("") == ["ListLocations"]


def test_a_slice_that_cannot_be_is_refused_before_anybody_is_asked() -> None:
    def problem(name: str = "a", config: PodConfig = V3_16, spot: bool = False) -> str:
        with pytest.raises(UserError) as caught:
            TpuVm(name, "local", config, spot=spot, startup_script="")
        return str(caught.value)

    for name in ("", "A", "1a", "a-", "a_b", "a" * 64):
        assert problem(name) == (
            f"--tpu {name!r} cannot be a TPU's name: write small letters, digits and -, a letter "
            "first"
        )
    assert problem(config=PodConfig(tpu_type="v3-8", tpu_reserved=True), spot=True) == (
        "--preemptible contradicts tpu_reserved; leave out one of them"
    )
    assert problem(config=PodConfig()) == (
        "set tpu_type to the slice to create, such as 'v3-8', or tpu_size"
    )


def test_credentials_that_have_expired_are_told_at_once(cloud: Any, time: Time) -> None:
    why = "Getting metadata from plugin failed with error: ('invalid_grant: Token has expired')"
    cloud.faults["GetNode"] = [fake.Fault(StatusCode.UNAVAILABLE, why)]
    with pytest.raises(UserError, match=r"(?s)Google Cloud refuses.*log in again: gcloud auth"):
        make_vm(time).ensure()
    assert not time.sleeps


class FakeGoogle:
    """Answers every request alike, and notes it."""

    def __init__(self, status: int, data: dict[str, Any]) -> None:
        self.status_code, self._data = status, data
        self.urls: list[str] = []

    def __call__(self, credentials: object) -> FakeGoogle:
        return self

    def get(self, url: str, timeout: float) -> FakeGoogle:
        self.urls.append(url)
        return self

    def json(self) -> dict[str, Any]:
        return self._data


@pytest.mark.parametrize("status", [200, 404])
def test_a_secret_is_read_from_secret_manager_or_its_lack_told(
    cloud: Any, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    import google.auth
    from google.auth.transport import requests

    answers = FakeGoogle(status, {"payload": {"data": "c2VjcmV0Cg=="}})
    monkeypatch.setattr(google.auth, "default", lambda scopes: (None, None))
    monkeypatch.setattr(requests, "AuthorizedSession", answers)
    api = tpu_api.connect("local", "my-project")
    if status == 200:
        assert api.secret("ray") == "secret"
    else:
        with pytest.raises(UserError, match=r"^tpu_token_secret 'ray' cannot be read \(HTTP 404\)"):
            api.secret("ray")
    assert answers.urls == [
        "https://secretmanager.googleapis.com/v1/projects/my-project/secrets/ray/versions/"
        "latest:access"
    ]


def test_the_driver_is_known_by_the_address_that_it_has_where_the_hosts_are(
    cloud: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tpu_api.connect("local", "my-project").own_address() == "127.0.0.1"
    monkeypatch.setattr(tpu_api, "METADATA", "no address")
    api = tpu_api.TpuApi(None, None, zone="us-central1-a", project="my-project")
    with pytest.raises(UserError, match="no network by which TPU VMs .* set tpu_driver_address"):
        api.own_address()
