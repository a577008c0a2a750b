"""Both ends of a line, equal bit for bit whatever is lost, restarted or wiped.

Every bad answer becomes a failure with its reason.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmira.adapters import digest, norm
from fedmira.errors import RunError, WireError
from fedmira.experiment import build_experiment
from fedmira.federation.ends import ServerEnd, serve
from fedmira.federation.node_memory import NodeMemory
from fedmira.messages import (
    Failure,
    Payload,
    Reply,
    Request,
    Volume,
)
from fedmira.model import BaseModel
from fedmira.storage import AdapterStore, MemoryTable
from fedmira.wire import (
    Encoded,
    Line,
    encode_answer,
    encode_request,
    pack,
    separated,
    unpack,
)
from small import cohort_of, local_of, make_config

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
CLIENT, RUN = "clinic/north", "run-1"
METRICS = {
    "loss": 0.5,
    "first_loss": 0.6,
    "last_loss": 0.4,
    "steps": 2.0,
    "response_tokens": 9.0,
    "tokens": 30.0,
}


def random_adapter(seed: int, size: float = 1.0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        A: size * torch.randn(4, 9, generator=draw),
        B: size * torch.randn(6, 4, generator=draw),
    }


def train(request: Request, memory: Payload | None) -> tuple[Reply | Failure, Payload | None]:
    """A made-up change that depends on the request alone.

    And a memory that counts the rounds that were used.
    """
    change = random_adapter(request.seed, 0.1)
    adapter = {
        name: tensor + change[name] for name, tensor in request.payload.tensors["adapter"].items()
    }
    used = memory.scalars["used"] if memory else 0.0
    return Reply(
        request.client_id, request.round, 7, Payload({"adapter": adapter}), METRICS
    ), Payload({}, {"used": used + 1})


def fail(request: Request, memory: Payload | None) -> tuple[Reply | Failure, Payload | None]:
    return Failure(
        request.client_id, request.round, "train", "non-finite loss at local step 1"
    ), memory


def request_of(round_number: int, adapter: dict[str, Tensor], client: str = CLIENT) -> Request:
    return Request(client, round_number, 1000 + round_number, Payload({"adapter": adapter}))


def node_holds(folder: Path, accepted_round: int) -> tuple[Line, Payload | None]:
    """The client's line and private memory, read from a copy.

    Reading drops what is not needed any more.
    """
    with TemporaryDirectory() as place:
        both = NodeMemory(shutil.copytree(folder, Path(place) / "copy"), RUN, CLIENT).recall(
            accepted_round
        )
    return Line.of(separated(both, "line")), separated(both, "own")


def server_line(server: ServerEnd) -> Line:
    return Line.of(server.memories.get(CLIENT))


@pytest.mark.parametrize("wire", ["float32", "float16", "int8"])
def test_requests_and_replies_arrive_whole(wire: str, tmp_path: Path) -> None:
    server, adapter = ServerEnd(wire, RUN), random_adapter(0)
    message = server.send(request_of(1, adapter))
    answer = server.receive(request_of(1, adapter), serve(message, CLIENT, tmp_path, train))
    assert isinstance(answer, Reply)
    assert (answer.client_id, answer.round, answer.num_examples, answer.metrics) == (
        CLIENT,
        1,
        7,
        METRICS,
    )
    expected, _ = train(request_of(1, adapter), None)
    assert isinstance(expected, Reply)
    found, trained = answer.payload.tensors["adapter"], expected.payload.tensors["adapter"]
    exact = {"float32": 0.0, "float16": 2**-11, "int8": 1 / 127}[wire]
    for name, tensor in trained.items():
        assert float((found[name] - tensor).abs().max()) <= exact * float(
            (tensor - adapter[name]).abs().max()
        ) + 1e-6 * (wire != "float32")
    parameters = 4 * (9 + 6)
    up = {"float32": 4 * parameters, "float16": 2 * parameters, "int8": parameters + 4 * (4 + 4)}[
        wire
    ]
    assert answer.traffic is not None
    assert answer.traffic.down == Volume(4 * parameters, "float32"), (
        "nobody holds a reference in round 1"
    )
    assert answer.traffic.up.num_bytes == up


EVENTS = (
    "round",
    "request lost",
    "reply lost",
    "training fails",
    "server resumes",
    "server killed before its checkpoint",
    "node wiped",
    "server moves",
)


@pytest.mark.parametrize("wire", ["float16", "int8"])
@given(events=st.lists(st.sampled_from(EVENTS), min_size=1, max_size=25))
@example(
    [
        "round",
        "round",
        "server killed before its checkpoint",
        "round",
        "reply lost",
        "round",
        "node wiped",
        "round",
        "round",
    ]
)
@settings(deadline=None, max_examples=30)
def test_both_ends_hold_the_same_bits_whatever_happens_between_them(
    wire: str, events: list[str]
) -> None:
    with TemporaryDirectory() as place:
        folder, server, adapter, wiped, used = (
            Path(place),
            ServerEnd(wire, RUN),
            random_adapter(0),
            False,
            0,
        )
        checkpoint = server.memories
        former = checkpoint, adapter, used
        for number, event in enumerate(events, start=1):
            if event.startswith("server") and event != "server moves":
                if (
                    "before" in event
                ):  # of the last accepted reply, which the loop then has not used either
                    checkpoint, adapter, used = former
                server = ServerEnd(wire, RUN)
                server.restore(checkpoint)
            elif event == "node wiped":
                shutil.rmtree(folder)
                folder.mkdir()
                wiped, used, former = True, 0, (former[0], former[1], 0)
            elif event == "server moves":
                adapter = {name: tensor * 0.9 for name, tensor in adapter.items()}
            else:
                request, former = request_of(number, adapter), (server.memories, adapter, used)
                message = server.send(request)
                before = server_line(server)
                if event == "request lost":
                    assert isinstance(
                        server.lost(request, "reply", "no answer within 60 s"), Failure
                    )
                    continue
                back = serve(message, CLIENT, folder, fail if event == "training fails" else train)
                if event == "reply lost":
                    assert server_line(server).digest == before.digest
                    continue
                answer = server.receive(request, back)
                if isinstance(answer, Failure):
                    assert event == "training fails" or (wiped and answer.stage == "wire"), answer
                    assert server_line(server).digest == (
                        "" if answer.stage == "wire" else before.digest
                    )
                    wiped = wiped and answer.stage != "wire"
                else:
                    wiped, used = False, used + 1
                    adapter = dict(answer.payload.tensors["adapter"])
                    here, (there, own) = server_line(server), node_holds(folder, number)
                    assert here.round == there.round == number
                    assert here.digest == there.digest != ""
                    assert digest(here.reference["adapter"]) == digest(adapter)
                    assert own is not None and own.scalars["used"] == used, (
                        "memory of a reply that was not used is dropped"
                    )
                checkpoint = server.memories


def test_what_the_server_accepted_is_the_clients_change_but_for_what_is_carried(
    tmp_path: Path,
) -> None:
    """Over rounds: accepted changes plus the client's carried rest are all of its changes.

    And the same for the server's.
    """
    server, adapter = ServerEnd("int8", RUN), random_adapter(0)
    true_up = {
        name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in adapter.items()
    }
    true_down = {name: tensor.clone() for name, tensor in true_up.items()}
    got_up, got_down = (
        {name: tensor.clone() for name, tensor in true_up.items()} for _ in range(2)
    )
    for number in range(1, 12):
        loaded: dict[str, Tensor] = {}

        def noting(
            request: Request, memory: Payload | None, into: dict[str, Tensor] = loaded
        ) -> tuple[Reply | Failure, Payload | None]:
            into.update(request.payload.tensors["adapter"])
            return train(request, memory)

        held = server_line(server).reference.get("adapter", adapter)
        request = request_of(number, adapter)
        answer = server.receive(request, serve(server.send(request), CLIENT, tmp_path, noting))
        assert isinstance(answer, Reply)
        change = random_adapter(request.seed, 0.1)
        for name in adapter:
            true_down[name] += adapter[name].double() - held[name].double()
            got_down[name] += loaded[name].double() - held[name].double()
            true_up[name] += change[name].double()
            got_up[name] += answer.payload.tensors["adapter"][name].double() - loaded[name].double()
        adapter = {
            name: 0.95 * tensor for name, tensor in answer.payload.tensors["adapter"].items()
        }
    here, there = server_line(server), node_holds(tmp_path, 11)[0]
    for name in adapter:
        assert torch.allclose(
            got_up[name] + there.unsent["adapter"][name], true_up[name], rtol=0, atol=1e-5
        )
        assert torch.allclose(
            got_down[name] + here.unsent["adapter"][name], true_down[name], rtol=0, atol=1e-5
        )
    assert norm(here.unsent["adapter"]) > 0 and norm(there.unsent["adapter"]) > 0


def test_real_training_through_messages_equals_training_in_one_process(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    """Bit for bit in float32, with moments that lie on the node and not on the server.

    A node restarts between any two messages.
    """
    settings = {"algorithm.name": "fedavg", "local.optimizer_state": "kept"}
    experiment = build_experiment(make_config(base_folder, clients_folder, settings), base)
    cohort, algorithm = cohort_of(experiment, experiment.algorithm), experiment.algorithm
    alone, server = local_of(experiment, 1), ServerEnd("float32", RUN)
    state = algorithm.initial_state(experiment.starts)
    for number in (1, 2):
        requests = [
            Request(client, number, 50 + number, algorithm.instruct(state, client))
            for client in experiment.ranks
        ]
        expected = alone.train(requests)
        for request, reply in zip(requests, expected, strict=True):

            def work(
                arrived: Request, memory: Payload | None
            ) -> tuple[Reply | Failure, Payload | None]:
                return cohort.work([arrived], {arrived.client_id: memory} if memory else {})[0]

            message = unpack(pack(server.send(request)))
            found = server.receive(
                request, unpack(pack(serve(message, request.client_id, tmp_path, work)))
            )
            assert isinstance(found, Reply) and isinstance(reply, Reply)
            assert digest(found.payload.tensors["adapter"]) == digest(
                reply.payload.tensors["adapter"]
            )
            assert (found.metrics, found.num_examples) == (reply.metrics, reply.num_examples)
            assert (
                found.traffic is not None and found.traffic.up.num_bytes == reply.payload.num_bytes
            )
        replies = [reply for reply in expected if isinstance(reply, Reply)]
        state = algorithm.combine(state, replies).state
    assert all(set(memory.tensors) == set() for memory in server.memories.values()), (
        "the server holds nobody's moments"
    )
    assert alone.memories[requests[0].client_id].scalars["optimizer.steps"] == 4


def test_lines_lie_in_the_store_of_the_checkpoint_like_memories(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    server = ServerEnd("int8", RUN)
    server.restore(MemoryTable(store, {}))
    request = request_of(1, random_adapter(0))
    server.receive(request, serve(server.send(request), CLIENT, tmp_path / "node", train))
    table = server.memories
    assert isinstance(table, MemoryTable)
    again = ServerEnd("int8", RUN)
    again.restore(MemoryTable(AdapterStore(tmp_path / "store"), table.entries))
    later = request_of(2, random_adapter(1))
    assert again.send(later).header == server.send(later).header
    assert isinstance(
        again.receive(later, serve(again.send(later), CLIENT, tmp_path / "node", train)), Reply
    )


def test_a_float32_line_remembers_the_round_alone(tmp_path: Path) -> None:
    server, request = ServerEnd("float32", RUN), request_of(4, random_adapter(0))
    server.receive(request, serve(server.send(request), CLIENT, tmp_path, train))
    assert server_line(server) == Line(4)


def test_a_node_that_is_not_meant_says_who_it_is(tmp_path: Path) -> None:
    server, request = ServerEnd("float32", RUN), request_of(1, random_adapter(0))
    answer = server.receive(request, serve(server.send(request), "clinic/south", tmp_path, train))
    assert isinstance(answer, Failure) and answer.stage == "request"
    assert (
        answer.reason == "this node is client 'clinic/south', but the request is for 'clinic/north'"
    )


def test_an_error_of_the_work_reaches_the_server_in_its_own_words(tmp_path: Path) -> None:
    def broken(request: Request, memory: Payload | None) -> tuple[Reply | Failure, Payload | None]:
        raise RunError("the card is out of memory")

    server, request = ServerEnd("int8", RUN), request_of(1, random_adapter(0))
    answer = server.receive(request, serve(server.send(request), CLIENT, tmp_path, broken))
    assert isinstance(answer, Failure) and (answer.stage, answer.reason) == (
        "train",
        "the card is out of memory",
    )


def test_a_damaged_memory_reaches_the_server_as_a_failure(tmp_path: Path) -> None:
    server, adapter = ServerEnd("int8", RUN), random_adapter(0)
    server.receive(
        request_of(1, adapter), serve(server.send(request_of(1, adapter)), CLIENT, tmp_path, train)
    )
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-5])
    request = request_of(2, adapter)
    answer = server.receive(request, serve(server.send(request), CLIENT, tmp_path, train))
    assert isinstance(answer, Failure) and answer.stage == "memory"
    assert file.name in answer.reason and "cannot be read" in answer.reason


def test_a_folder_that_cannot_be_written_reaches_the_server_as_a_failure(tmp_path: Path) -> None:
    in_the_way = tmp_path / "folder"
    in_the_way.write_text("a file")
    server, request = ServerEnd("float32", RUN), request_of(1, random_adapter(0))
    answer = server.receive(request, serve(server.send(request), CLIENT, in_the_way, train))
    assert (
        isinstance(answer, Failure)
        and "cannot be written" in answer.reason
        and "choose another folder" in answer.reason
    )


def test_a_message_that_is_no_request_has_nobody_to_answer_to(tmp_path: Path) -> None:
    with pytest.raises(WireError, match="the header's client is None; must be a text"):
        serve(Encoded({}, {}), CLIENT, tmp_path, train)
    reply, _ = train(request_of(1, random_adapter(0)), None)
    message, _ = encode_answer(reply, "float32", Line())
    back = serve(
        Encoded(message.arrays, {**message.header, "run": RUN, "accepted_round": 0}),
        CLIENT,
        tmp_path,
        train,
    )
    assert back.header["reason"] == "the message is a 'reply'; expected a 'request'"


def answer_with(
    tensors: dict[str, Any],
    header: dict[str, Any] | None = None,
    metrics: dict[str, float] | None = None,
) -> Encoded:
    """A reply of round 2 to `CLIENT` that holds these tensors, whole.

    Entries of its header are replaced; None removes one.
    """
    message, _ = encode_answer(
        Reply(CLIENT, 2, 7, Payload(tensors), metrics or METRICS), "float32", Line()
    )
    replaced = {**message.header, **(header or {})}
    return Encoded(
        message.arrays, {name: value for name, value in replaced.items() if value is not None}
    )


GOOD = random_adapter(5)
BAD_ANSWERS = {
    "another client": (
        answer_with({"adapter": GOOD}, {"client": "law"}),
        "the reply is of client 'law'; expected 'clinic/north'",
    ),
    "no client": (
        answer_with({"adapter": GOOD}, {"client": None}),
        "the reply is of client None; expected 'clinic/north'",
    ),
    "another round": (
        answer_with({"adapter": GOOD}, {"round": 1}),
        "the reply is of round 1; expected round 2",
    ),
    "no kind": (
        answer_with({"adapter": GOOD}, {"kind": None}),
        "the header's kind is None; must be a text",
    ),
    "a request": (
        answer_with({"adapter": GOOD}, {"kind": "request"}),
        "the message is a 'request'; expected a 'reply' or a 'failure'",
    ),
    "no rows": (
        answer_with({"adapter": GOOD}, {"num_examples": 0}),
        "the reply counts 0 training rows; must be at least 1",
    ),
    "negative rows": (
        answer_with({"adapter": GOOD}, {"num_examples": -3}),
        "the header's num_examples is -3; must be a whole number, 0 or more",
    ),
    "half a row": (
        answer_with({"adapter": GOOD}, {"num_examples": 0.5}),
        "the header's num_examples is 0.5; must be a whole number, 0 or more",
    ),
    "a metric that is text": (
        answer_with({"adapter": GOOD}, {"metric:loss": "low"}),
        "the header's metric:loss is 'low'; must be a number",
    ),
    "a figure missing": (
        answer_with({"adapter": GOOD}, {"metric:steps": None}),
        "the reply's steps is None; must be a finite number",
    ),
    "a loss that is none": (
        answer_with({"adapter": GOOD}, {"metric:last_loss": float("nan")}),
        "the reply's last_loss is nan; must be a finite number",
    ),
    "a further figure that is none": (
        answer_with({"adapter": GOOD}, {"metric:pull_kept": float("nan")}),
        "the reply holds non-finite numbers (in pull_kept); the client keeps its old adapter",
    ),
    "nothing learned from": (
        answer_with({"adapter": GOOD}, {"metric:response_tokens": 0.0}),
        "the reply counts no response tokens; must be at least 1",
    ),
    "a number that is none": (
        answer_with({"adapter": GOOD}, {"scalar:weight": float("inf")}),
        "the reply holds non-finite numbers (in weight); the client keeps its old adapter",
    ),
    "no adapter": (
        answer_with({"other": GOOD}),
        "the reply holds no adapter; expected one of 2 tensors",
    ),
    "a name missing": (
        answer_with({"adapter": {A: GOOD[A]}}),
        f"the reply's adapter lacks {B}; expected the 2 names of the request",
    ),
    "a name too many": (
        answer_with({"adapter": {**GOOD, "layer.bias": torch.zeros(3)}}),
        "the reply's adapter also holds layer.bias; expected the 2 names of the request",
    ),
    "another name": (
        answer_with({"adapter": {A: GOOD[A], "b": GOOD[B]}}),
        f"the reply's adapter lacks {B} and also holds b; expected the 2 names of the request",
    ),
    "another shape": (
        answer_with({"adapter": {**GOOD, A: torch.zeros(4, 8)}}),
        f"the reply's adapter {A} is float32 (4, 8); expected float32 (4, 9)",
    ),
    "another type": (
        answer_with({"adapter": {**GOOD, A: torch.zeros(4, 9, dtype=torch.int32)}}),
        f"the reply's adapter {A} is int32 (4, 9); expected float32 (4, 9)",
    ),
    "not a number": (
        answer_with({"adapter": {**GOOD, A: torch.full((4, 9), float("nan"))}}),
        "the reply holds non-finite numbers (in adapter); the client keeps its old adapter",
    ),
    "an infinity beside the adapter": (
        answer_with({"adapter": GOOD, "movement": {"c": torch.tensor([float("inf")])}}),
        "the reply holds non-finite numbers (in movement); the client keeps its old adapter",
    ),
    "changed on its way": (
        answer_with({"adapter": GOOD}, {"result": "0" * 64}),
        "what was read is not what was sent: the message was changed on its way, or both "
        "ends compute differently",
    ),
    "nothing at all": (Encoded({}, {}), "the reply is of client None; expected 'clinic/north'"),
    "an array that is no tensor": (
        Encoded({f"adapter|{A}": np.array(["x"])}, answer_with({"adapter": GOOD}).header),
        f"{A}: the message holds str32; must be one of float32, int32, int64",
    ),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_a_bad_answer_becomes_a_failure_that_says_what_and_what_was_expected(
    name: str, tmp_path: Path
) -> None:
    message, reason = BAD_ANSWERS[name]
    server, adapter = ServerEnd("int8", RUN), random_adapter(0)
    first = server.receive(
        request_of(1, adapter), serve(server.send(request_of(1, adapter)), CLIENT, tmp_path, train)
    )
    assert isinstance(first, Reply)
    line, request = server_line(server), request_of(2, adapter)
    server.send(request)
    answer = server.receive(request, message)
    assert isinstance(answer, Failure)
    assert (answer.client_id, answer.round, answer.stage, answer.reason) == (
        CLIENT,
        2,
        "reply",
        reason,
    )
    assert answer.traffic is not None and answer.traffic.up.num_bytes == message.volume.num_bytes
    assert server_line(server).digest == line.digest and server_line(server).round == 1
    good = server.receive(request, serve(server.send(request), CLIENT, tmp_path, train))
    assert isinstance(good, Reply), "the next request finds everything as it was"


def test_the_good_answer_of_those_tests_is_good() -> None:
    server, request = ServerEnd("float32", RUN), request_of(2, random_adapter(0))
    server.send(request)
    assert isinstance(server.receive(request, answer_with({"adapter": GOOD})), Reply)


def test_a_late_reply_of_a_former_round_is_not_taken_for_this_one(tmp_path: Path) -> None:
    server, adapter = ServerEnd("int8", RUN), random_adapter(0)
    late = serve(server.send(request_of(1, adapter)), CLIENT, tmp_path, train)
    server.lost(request_of(1, adapter), "reply", "no answer in time")
    server.send(request_of(2, adapter))
    answer = server.receive(request_of(2, adapter), late)
    assert (
        isinstance(answer, Failure) and answer.reason == "the reply is of round 1; expected round 2"
    )


def test_the_header_of_a_request_names_run_and_accepted_round() -> None:
    message, _ = encode_request(request_of(5, random_adapter(0)), "int8", Line(3), RUN)
    assert {
        name: message.header[name]
        for name in ("run", "accepted_round", "client", "round", "seed", "kind", "wire")
    } == {
        "run": RUN,
        "accepted_round": 3,
        "client": CLIENT,
        "round": 5,
        "seed": 1005,
        "kind": "request",
        "wire": "int8",
    }
    assert {type(value) for value in message.header.values()} <= {str, int, float}
