"""The safeguard: a client's own validation rows choose how much of the server's pull it keeps.

Both to start a round with and at the end.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from fedmira.adapters import content_hash, digest
from fedmira.clients import Candidates, LocalClients
from fedmira.config import load_config
from fedmira.errors import ConfigError
from fedmira.experiment import Experiment, build_experiment, run_experiment
from fedmira.messages import Reply
from fedmira.model import BaseModel
from fedmira.report import read_run
from fedmira.report.findings import pull_kept
from fedmira.runs import Result
from small import adapter_bytes, events_of, local_of, make_config, run_loop, table_of, with_clients

ALIKE = ("alike-1", "alike-2", "alike-3", "alike-4")
SETTINGS: dict[str, Any] = {
    "data.train_fraction": 0.3,
    "data.validation_fraction": 0.3,
    "local.steps": 6,
    "local.learning_rate": 0.02,
    "rounds.count": 3,
    "graph.kind": "uniform",
    "evaluation.every": 1,
}
Run = Callable[..., Result]


def write_answers(folder: Path, answers: Mapping[str, int]) -> Path:
    """Clients with the same questions.

    A client's number says with which two words it answers, and the question with which of them.
    """
    for name, shift in answers.items():
        draw = random.Random(name)
        rows = [[draw.randrange(6), draw.randrange(20, 80)] for _ in range(32)]
        lines = [
            json.dumps(
                {
                    "instruction": "w1 w2 w3",
                    "input": f"w{10 + first} w{other}",
                    "output": f"w{80 + 2 * shift + first % 2}",
                }
            )
            + "\n"
            for first, other in rows
        ]
        (folder / name).mkdir(parents=True)
        (folder / name / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def one_apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clients with one task, and one with the same questions and other answers."""
    return write_answers(
        tmp_path_factory.mktemp("data") / "clients", {**dict.fromkeys(ALIKE, 0), "apart": 3}
    )


@pytest.fixture(scope="module")
def all_alike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four clients with one task."""
    return write_answers(tmp_path_factory.mktemp("data") / "clients", dict.fromkeys(ALIKE, 0))


@pytest.fixture(scope="module")
def all_apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clients who contradict each other."""
    return write_answers(
        tmp_path_factory.mktemp("data") / "clients", {f"apart-{shift}": shift for shift in range(4)}
    )


def built(
    base: BaseModel, base_folder: Path, data: Path, settings: Mapping[str, Any]
) -> Experiment:
    unweighted = {} if settings.get("algorithm.name") == "local" else {"algorithm.size_scale": 0}
    return build_experiment(
        make_config(base_folder, data, {**SETTINGS, **unweighted, **settings}), base
    )


@pytest.fixture(scope="module")
def run(base: BaseModel, base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs in a new folder; the same settings are run once."""
    done: dict[str, Result] = {}

    def once(data: Path, **settings: Any) -> Result:
        keys = {name.replace("__", "."): value for name, value in settings.items()}
        key = repr((data, keys))
        if key not in done:
            done[key] = run_experiment(
                built(base, base_folder, data, keys), tmp_path_factory.mktemp("runs") / "run"
            )
        return done[key]

    return once


def shares(result: Result, kind: str) -> dict[str, list[float]]:
    """client -> the shares of the pull that it kept in the events of one kind, by rising round."""
    found: dict[str, list[float]] = {}
    for event in events_of(result.folder, kind):
        if "pull_kept" in event:
            found.setdefault(event["client"], []).append(event["pull_kept"])
    return found


def weights(result: Result, client: str) -> bytes:
    return adapter_bytes(result.folder)[f"adapters/{client}/adapter_model.safetensors"]


@pytest.mark.parametrize("space", ["product", "factor"])
def test_clients_who_contradict_each_other_decline_and_then_the_run_is_local_training_bit_for_bit(
    space: str, run: Run, all_apart: Path
) -> None:
    local, guarded = (
        run(all_apart, algorithm__name="local"),
        run(all_apart, algorithm__safeguard=True, algorithm__space=space),
    )
    assert shares(guarded, "train") == {f"apart-{k}": [0.0, 0.0] for k in range(4)}, (
        "in rounds 2 and 3; in round 1 nothing was pulled yet"
    )
    assert shares(guarded, "evaluate") == {f"apart-{k}": [0.0, 0.0, 0.0] for k in range(4)}
    assert adapter_bytes(guarded.folder, cards=False) == adapter_bytes(local.folder, cards=False)
    assert table_of(guarded.folder, "clients") == table_of(local.folder, "clients")
    assert [row["pull_kept"] for row in table_of(guarded.folder, "rounds")] == ["", "0.0", "0.0"]
    assert {event["relative_pull"] > 0 for event in events_of(guarded.folder, "align")} == {True}, (
        "the server pulls all the same"
    )


def test_a_client_like_no_other_ends_as_it_would_alone_though_the_others_accept(
    run: Run, one_apart: Path
) -> None:
    local, forced, guarded = (
        {row["client"]: row for row in run(one_apart, **settings).clients}
        for settings in ({"algorithm__name": "local"}, {}, {"algorithm__safeguard": True})
    )
    assert forced["apart"]["after_align_loss"] > 1.2 * local["apart"]["after_align_loss"], (
        "the case must be one in which the pull harms"
    )
    result = run(one_apart, algorithm__safeguard=True)
    assert (
        set(shares(result, "train")["apart"]) == {0.0}
        and max(max(shares(result, "train")[client]) for client in ALIKE) > 0
    )
    assert guarded["apart"] == local["apart"]
    assert weights(result, "apart") == weights(run(one_apart, algorithm__name="local"), "apart")


def test_clients_with_one_task_accept_and_the_page_counts_who_declined(
    run: Run, all_alike: Path
) -> None:
    result = run(all_alike, algorithm__safeguard=True)
    kept = shares(result, "train")
    assert (
        all(max(of_client) > 0 for of_client in kept.values())
        and sum(map(sum, kept.values())) / 8 > 0.3
    )
    last = [of_client[-1] for of_client in shares(result, "evaluate").values()]
    found = pull_kept(read_run(result.folder))
    assert found is not None
    assert (found.nothing, found.some, found.everything) == (
        last.count(0.0),
        last.count(0.5),
        last.count(1.0),
    ) and found.clients == 4
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert f"{last.count(0.0)} of 4" in page and "Declined the server" in page


def test_what_a_client_is_given_at_the_end_of_a_round_is_what_it_starts_the_next_one_with(
    run: Run, one_apart: Path
) -> None:
    """The server's choice and the client's own are the same.

    One goes by the adapter that was sent, the other by the one that the client remembers.
    """
    result = run(one_apart, algorithm__safeguard=True)
    evaluated, started = shares(result, "evaluate"), shares(result, "train")
    assert {client: given[:-1] for client, given in evaluated.items()} == started


def test_the_choice_has_the_lowest_validation_loss_of_own_half_way_and_aligned(
    run: Run, base: BaseModel, base_folder: Path, one_apart: Path
) -> None:
    config = make_config(
        base_folder, one_apart, {**SETTINGS, "algorithm.size_scale": 0, "algorithm.safeguard": True}
    )
    experiment, states, outcomes = run_loop(config, base)
    noted = {
        (e["round"], e["client"]): e
        for e in events_of(run(one_apart, algorithm__safeguard=True).folder, "evaluate")
    }
    for state, outcome in zip(states[1:], outcomes, strict=True):
        own = {reply.client_id: reply.payload.tensors["adapter"] for reply in outcome.replies}
        half = {
            client: experiment.algorithm.alternatives(own[client], state.adapters[client])[0.5]
            for client in own
        }
        candidates = {1.0: state.adapters, 0.5: half, 0.0: own}
        losses = {
            share: experiment.clients.losses(adapters, "validation")
            for share, adapters in candidates.items()
        }
        tests = {
            share: experiment.clients.losses(adapters, "test")
            for share, adapters in candidates.items()
        }
        for client in own:
            event = noted[outcome.round, client]
            best = min(candidates, key=lambda share: losses[share][client].per_token)
            assert event["pull_kept"] == best
            assert event["validation_loss"] == pytest.approx(
                losses[best][client].per_token, rel=1e-6
            )
            assert event["test_loss"] == pytest.approx(tests[best][client].per_token, rel=1e-6)


def test_the_choice_never_reads_test_rows(
    base: BaseModel, base_folder: Path, run: Run, one_apart: Path, tmp_path: Path
) -> None:
    """With the test rows of another client, everything but the test losses is the same."""
    experiment = built(base, base_folder, one_apart, {"algorithm.safeguard": True})
    own = experiment.clients.data
    others = dict(zip(own, [*list(own.values())[1:], next(iter(own.values()))], strict=True))
    clients = {
        name: replace(client, test=others[name].test, references=others[name].references)
        for name, client in own.items()
    }
    exchanged = with_clients(experiment, local_of(experiment, data=clients))
    result, expected = (
        run_experiment(exchanged, tmp_path / "run"),
        run(one_apart, algorithm__safeguard=True),
    )
    assert events_of(result.folder, "train") == events_of(expected.folder, "train")
    assert shares(result, "evaluate") == shares(expected, "evaluate")
    assert all(weights(result, client) == weights(expected, client) for client in clients)
    found, before = (
        {row["client"]: row["base_loss"] for row in each.clients} for each in (result, expected)
    )
    assert found != before and sorted(found.values()) == pytest.approx(sorted(before.values())), (
        "the test rows must really be exchanged"
    )


@dataclass(eq=False)
class Counting(LocalClients):
    """Notes when choices are measured."""

    asked: list[int] = field(default_factory=list)

    def choose(self, clients: Sequence[str], candidates: Candidates) -> dict[str, float]:
        self.asked.append(len(clients))
        return super().choose(clients, candidates)


def test_the_last_choice_is_measured_once(
    base: BaseModel, base_folder: Path, run: Run, one_apart: Path, tmp_path: Path
) -> None:
    """After each of three rounds; what is saved is what the last of them chose.

    At the start nobody has sent anything, and nobody has a choice.
    """
    experiment = built(base, base_folder, one_apart, {"algorithm.safeguard": True})
    plain = local_of(experiment)
    counting = Counting(plain.method, plain.kind, plain.data, plain.settings)
    result = run_experiment(with_clients(experiment, counting), tmp_path / "run")
    assert counting.asked == [0, 5, 5, 5]
    assert adapter_bytes(result.folder) == adapter_bytes(
        run(one_apart, algorithm__safeguard=True).folder
    )


def test_a_client_remembers_what_it_sent_beside_kept_moments_and_nothing_more_travels(
    base: BaseModel, base_folder: Path, one_apart: Path
) -> None:
    settings = {"algorithm.space": "factor", "local.optimizer_state": "kept", "rounds.count": 2}
    plain = run_loop(make_config(base_folder, one_apart, {**SETTINGS, **settings}), base)
    guarded = run_loop(
        make_config(base_folder, one_apart, {**SETTINGS, **settings, "algorithm.safeguard": True}),
        base,
    )
    for before, after in zip(plain[2], guarded[2], strict=True):
        assert [request.payload.num_bytes for request in before.requests] == [
            request.payload.num_bytes for request in after.requests
        ]
        assert [reply.payload.num_bytes for reply in before.replies] == [
            reply.payload.num_bytes for reply in after.replies
        ]
    last: dict[str, Reply] = {reply.client_id: reply for reply in guarded[2][-1].replies}
    for client, memory in guarded[0].clients.memories.items():
        assert set(memory.tensors) == {"own", "optimizer.first", "optimizer.second"}
        assert digest(memory.tensors["own"]) == digest(last[client].payload.tensors["adapter"])
        assert memory.scalars["optimizer.steps"] == 12
    first, second = guarded[2]
    assert all("pull_kept" not in reply.metrics for reply in first.replies)
    for (
        reply
    ) in second.replies:  # a choice takes three passes over the validation rows, which are counted
        alone = {other.client_id: other for other in plain[2][1].replies}[reply.client_id]
        assert (
            reply.metrics["tokens"] > alone.metrics["tokens"]
            and reply.metrics["response_tokens"] == alone.metrics["response_tokens"]
        )


def test_clients_out_of_the_round_keep_their_choice_between_what_they_sent_and_what_came_of_it(
    base: BaseModel, base_folder: Path, one_apart: Path, tmp_path: Path
) -> None:
    settings = {
        "algorithm.safeguard": True,
        "rounds.participation": 0.6,
        "rounds.count": 4,
        "evaluation.select": "best",
    }
    result = run_experiment(built(base, base_folder, one_apart, settings), tmp_path / "run")
    best: dict[str, float] = {}
    for event in events_of(result.folder, "evaluate"):
        best[event["client"]] = min(
            event["validation_loss"], best.get(event["client"], float("inf"))
        )
    assert {row["client"]: row["best_validation_loss"] for row in result.clients} == best
    index = json.loads((result.folder / "adapters" / "index.json").read_text(encoding="utf-8"))
    assert {client: content_hash(adapter) for client, adapter in result.adapters.items()} == {
        client: entry["sha256"] for client, entry in index.items()
    }
    experiment = built(base, base_folder, one_apart, settings)
    losses = experiment.clients.losses(result.adapters, "validation")
    assert {client: loss.per_token for client, loss in losses.items()} == pytest.approx(
        best, rel=1e-6
    )


def test_without_validation_rows_there_is_nothing_to_choose_by() -> None:
    with pytest.raises(
        ConfigError,
        match=r"algorithm\.safeguard = true needs validation rows; set data\.validation_fraction "
        r"above 0",
    ):
        load_config(None, None, ["algorithm.safeguard=true"])
