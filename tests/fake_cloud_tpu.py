"""A local gRPC server that speaks the Cloud TPU API, for the real client over an insecure channel.

    with fake_cloud_tpu.serve() as cloud:
        cloud.plans["a"] = ["CREATING", "CREATING", "READY"]

Nothing happens by itself: each look at a node takes it one step further in its plan, and stays at
the last. With `Vms` the hosts of a READY node are local processes that run its start-up script.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import fake_tpu_vms
import grpc
from google.cloud import tpu_v2, tpu_v2alpha1
from google.cloud.location import locations_pb2
from google.longrunning import operations_pb2

V2, V2ALPHA1 = "google.cloud.tpu.v2.Tpu", "google.cloud.tpu.v2alpha1.Tpu"
ZONES = ("local", "us-central1-a", "us-central1-b", "europe-west4-a", "europe-west4-b")
TYPES = ("v2-8", "v3-8", "v3-16", "v3-32", "v4-8", "v4-16", "v5litepod-16", "v5p-8", "v6e-8")
RUNTIMES = ("tpu-ubuntu2204-base", "v2-alpha-tpuv5", "v2-alpha-tpuv5-lite", "v2-alpha-tpuv6e")
CORES_PER_HOST = 8


@dataclasses.dataclass
class Fault:
    """What a call is answered instead.

    Attributes:
        done: Whether the call has its effect first, and only its reply is lost.
    """

    code: grpc.StatusCode
    message: str = ""
    done: bool = False


class FakeCloudTpu:
    """All zones of one project.

    Attributes:
        nodes: By name.
        requests: Queued resources by name.
        plans: States of the node of each name, one per look; "CREATING", "READY" unless given.
        queues: States of the queued resource of each name likewise; its node exists from
            PROVISIONING on.
        faults: What the next calls of a method are answered; one is used up per call.
        failures: What the next operations that create something fail of: code and message.
        without_address: Looks at a READY node during which its last host has no address.
        calls: Service and method of every call, in order.
        asked: The request of every call, in order.
        hasty: Methods of calls that came without a deadline.
    """

    def __init__(self, vms: fake_tpu_vms.Vms | None = None) -> None:
        self.vms = vms
        self.nodes: dict[str, Any] = {}
        self.requests: dict[str, Any] = {}
        self.plans: dict[str, list[str]] = {}
        self.queues: dict[str, list[str]] = {}
        self.faults: dict[str, list[Fault]] = collections.defaultdict(list)
        self.failures: list[tuple[grpc.StatusCode, str]] = []
        self.without_address = 0
        self.calls: list[tuple[str, str]] = []
        self.asked: list[Any] = []
        self.hasty: list[str] = []
        self._operations: dict[str, Any] = {}
        self._booted: set[str] = set()
        self._numbers = itertools.count()
        self._server = grpc.server(futures.ThreadPoolExecutor(1))  # one call at a time
        for service, methods in self._services().items():
            handler = grpc.method_handlers_generic_handler(service, methods)
            self._server.add_generic_rpc_handlers((handler,))
        here = vms.network.gateway if vms else "127.0.0.1"
        self.endpoint = f"{here}:{self._server.add_insecure_port(f'{here}:0')}"
        self._server.start()

    def close(self) -> None:
        self._server.stop(None).wait()
        if self.vms:
            self.vms.close()

    def preempt(self, name: str) -> None:
        """Take a slice away, as happens to spot ones; its remains stay listed."""
        if name in self.requests:
            self.vanish(name)
            self.queues[name] = ["SUSPENDED"]
        else:
            self._shut_down(name)
            self.plans[name] = ["PREEMPTED"]

    def vanish(self, name: str) -> None:
        """Delete a node behind everybody's back."""
        self._shut_down(name)
        del self.nodes[name], self.plans[name]

    def methods(self, prefix: str) -> list[str]:
        """Return the calls so far of methods that begin so."""
        return [method for _, method in self.calls if method.startswith(prefix)]

    def _services(self) -> dict[str, dict[str, grpc.RpcMethodHandler]]:
        plus: dict[str, tuple[Any, Callable[[Any], Any]]] = {
            "GetNode": (tpu_v2.GetNodeRequest, self._get_node),
            "ListNodes": (tpu_v2.ListNodesRequest, self._list_nodes),
            "CreateNode": (tpu_v2.CreateNodeRequest, self._create_node),
            "DeleteNode": (tpu_v2.DeleteNodeRequest, self._delete_node),
            "StartNode": (tpu_v2.StartNodeRequest, self._start_node),
            "UpdateNode": (tpu_v2.UpdateNodeRequest, self._update_node),
            "GetQueuedResource": (tpu_v2.GetQueuedResourceRequest, self._get_request),
            "ListQueuedResources": (tpu_v2.ListQueuedResourcesRequest, self._list_requests),
            "CreateQueuedResource": (tpu_v2.CreateQueuedResourceRequest, self._create_request),
            "DeleteQueuedResource": (tpu_v2.DeleteQueuedResourceRequest, self._delete_request),
            "ListAcceleratorTypes": (tpu_v2.ListAcceleratorTypesRequest, self._list_types),
            "ListRuntimeVersions": (tpu_v2.ListRuntimeVersionsRequest, self._list_runtimes),
        }
        operations, locations = operations_pb2.GetOperationRequest, locations_pb2
        return {
            V2: {
                method: self._handler(V2, method, kind.deserialize, answer)
                for method, (kind, answer) in plus.items()
            },
            V2ALPHA1: {
                "CreateQueuedResource": self._handler(
                    *(V2ALPHA1, "CreateQueuedResource"),
                    tpu_v2alpha1.CreateQueuedResourceRequest.deserialize,
                    self._create_request_alpha,
                )
            },
            "google.longrunning.Operations": {
                "GetOperation": self._handler(
                    *("Operations", "GetOperation"), operations.FromString, self._get_operation
                )
            },
            "google.cloud.location.Locations": {
                "ListLocations": self._handler(
                    *("Locations", "ListLocations"),
                    locations.ListLocationsRequest.FromString,
                    self._list_locations,
                )
            },
        }

    def _handler(
        self,
        service: str,
        method: str,
        read: Callable[[bytes], Any],
        answer: Callable[[Any], Any],
    ) -> grpc.RpcMethodHandler:
        def serve(request: Any, context: grpc.ServicerContext) -> Any:
            self.calls.append((service, method))
            self.asked.append(request)
            if context.time_remaining() > 3600:  # without a deadline: for ever, nearly
                self.hasty.append(method)
            fault = self.faults[method].pop(0) if self.faults[method] else None
            if fault and not fault.done:
                context.abort(fault.code, fault.message)
            try:
                reply = answer(request)
            except _Refused as refused:
                context.abort(refused.code, str(refused))
            if fault:
                context.abort(fault.code, fault.message)
            return reply

        def write(message: Any) -> bytes:
            plus = hasattr(type(message), "serialize")
            return type(message).serialize(message) if plus else message.SerializeToString()

        return grpc.unary_unary_rpc_method_handler(serve, read, write)

    def _list_locations(self, request: Any) -> Any:
        first = 0 if not request.page_token else 3  # in two pages
        zones = ZONES[:3] if not first else ZONES[3:]
        return locations_pb2.ListLocationsResponse(
            locations=[locations_pb2.Location(location_id=zone) for zone in zones],
            next_page_token="" if first else "more",
        )

    def _list_types(self, request: Any) -> Any:
        types = [
            tpu_v2.AcceleratorType(name=f"{request.parent}/acceleratorTypes/{kind}", type_=kind)
            for kind in TYPES
        ]
        return tpu_v2.ListAcceleratorTypesResponse(accelerator_types=types)

    def _list_runtimes(self, request: Any) -> Any:
        versions = [tpu_v2.RuntimeVersion(version=version) for version in RUNTIMES]
        return tpu_v2.ListRuntimeVersionsResponse(runtime_versions=versions)

    def _create_node(self, request: Any) -> Any:
        if request.node_id in self.nodes:
            raise _Refused(grpc.StatusCode.ALREADY_EXISTS, f"{request.node_id} exists")
        self._put_node(request.parent, request.node_id, request.node)
        return self._operation(request.node_id)

    def _put_node(self, parent: str, name: str, node: Any) -> None:
        self.plans.setdefault(name, ["CREATING", "READY"])
        self.nodes[name] = tpu_v2.Node(node, name=f"{parent}/nodes/{name}")

    def _get_node(self, request: Any) -> Any:
        name = request.name.rpartition("/")[2]
        if name not in self.nodes:
            raise _Refused(grpc.StatusCode.NOT_FOUND, f"{name} not found")
        node, state = self.nodes[name], _next(self.plans[name])
        if state == "gone":
            self.vanish(name)
            raise _Refused(grpc.StatusCode.NOT_FOUND, f"{name} not found")
        node.state = getattr(tpu_v2.Node.State, state)
        if state == "READY":
            n_hosts = max(1, int(node.accelerator_type.partition("-")[2]) // CORES_PER_HOST)
            if self.vms and name not in self._booted:
                self.vms.boot(name, node.metadata, n_hosts)
                self._booted.add(name)
            addresses = [
                self.vms[name][i].place.address if self.vms else "127.0.0.1" for i in range(n_hosts)
            ]
            if self.without_address > 0:
                self.without_address -= 1
                addresses[-1] = ""
            node.network_endpoints = [tpu_v2.NetworkEndpoint(ip_address=a) for a in addresses]
        return node

    def _list_nodes(self, request: Any) -> Any:
        return tpu_v2.ListNodesResponse(nodes=list(self.nodes.values()))

    def _delete_node(self, request: Any) -> Any:
        name = request.name.rpartition("/")[2]
        if name not in self.nodes:
            raise _Refused(grpc.StatusCode.NOT_FOUND, f"{name} not found")
        self._shut_down(name)
        self.plans[name] = ["DELETING", "gone"]
        return operations_pb2.Operation(name="deletion")

    def _shut_down(self, name: str) -> None:
        self._booted.discard(name)
        if self.vms:
            self.vms.kill(name)

    def _start_node(self, request: Any) -> Any:
        self.plans[request.name.rpartition("/")[2]] = ["STARTING", "READY"]
        return operations_pb2.Operation(name="start")

    def _update_node(self, request: Any) -> Any:
        name = request.node.name.rpartition("/")[2]
        assert list(request.update_mask.paths) == ["metadata"]
        self.nodes[name].metadata = request.node.metadata
        if self.vms:
            self.vms.set_metadata(name, request.node.metadata)
        return operations_pb2.Operation(name="update")

    def _create_request(self, request: Any) -> Any:
        name = request.queued_resource_id
        if name in self.requests:
            raise _Refused(grpc.StatusCode.ALREADY_EXISTS, f"{name} exists")
        item = request.queued_resource
        item.name = f"{request.parent}/queuedResources/{name}"
        self.requests[name] = item
        waiting = ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
        self.queues.setdefault(name, waiting)
        return self._operation(name)

    def _create_request_alpha(self, request: Any) -> Any:
        text = tpu_v2alpha1.CreateQueuedResourceRequest.to_json(request)
        kind = tpu_v2.CreateQueuedResourceRequest  # does not know all that v2alpha1 knows
        return self._create_request(kind.from_json(text, ignore_unknown_fields=True))

    def _get_request(self, request: Any) -> Any:
        name = request.name.rpartition("/")[2]
        if name not in self.requests:
            raise _Refused(grpc.StatusCode.NOT_FOUND, f"{name} not found")
        item, state = self.requests[name], _next(self.queues[name])
        if state == "gone":
            for store in (self.requests, self.queues, self.nodes, self.plans):
                store.pop(name, None)
            raise _Refused(grpc.StatusCode.NOT_FOUND, f"{name} not found")
        if state == "FAILED" and item.state.state.name != "FAILED":
            code, message = self.failures.pop(0)
            item.state.failed_data.error = {"code": code.value[0], "message": message}
        item.state.state = getattr(tpu_v2.QueuedResourceState.State, state)
        if state in ("PROVISIONING", "ACTIVE") and name not in self.plans:
            spec = item.tpu.node_spec[0]
            self._put_node(spec.parent, spec.node_id, spec.node)
        return item

    def _list_requests(self, request: Any) -> Any:
        items = list(self.requests.values())
        return tpu_v2.ListQueuedResourcesResponse(queued_resources=items)

    def _delete_request(self, request: Any) -> Any:
        name = request.name.rpartition("/")[2]
        assert request.force
        self._shut_down(name)
        self.queues[name] = ["DELETING", "gone"]
        return operations_pb2.Operation(name="deletion")

    def _operation(self, name: str) -> Any:
        operation = operations_pb2.Operation(name=f"operations/{next(self._numbers)}")
        if self.failures and name not in self.queues:
            code, message = self.failures.pop(0)
            operation.error.code, operation.error.message = code.value[0], message
            operation.done = True
            del self.nodes[name], self.plans[name]
        self._operations[operation.name] = operation
        return operations_pb2.Operation(name=operation.name)

    def _get_operation(self, request: Any) -> Any:
        if request.name not in self._operations:
            raise _Refused(grpc.StatusCode.NOT_FOUND, f"{request.name} not found")
        return self._operations[request.name]


class _Refused(Exception):
    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        self.code = code
        super().__init__(message)


def _next(plan: list[str]) -> str:
    return plan.pop(0) if len(plan) > 1 else plan[0]


@contextlib.contextmanager
def serve(vms: fake_tpu_vms.Vms | None = None) -> Iterator[FakeCloudTpu]:
    cloud = FakeCloudTpu(vms)
    try:
        yield cloud
    finally:
        cloud.close()
