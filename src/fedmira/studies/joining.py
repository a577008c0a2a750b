"""A client that comes to a run that is over, and gets an adapter; the run stays as it is."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedmira.adapters import Adapter, content_hash, mix
from fedmira.atomic import replace_file
from fedmira.config import Config, load_config, with_overrides, with_settings
from fedmira.data import (
    Newcomer,
    ObjectRows,
    about_advantages,
    id_problem,
    load_newcomer,
)
from fedmira.errors import ConfigError, RunFolderError
from fedmira.experiment import client_ranks, where_they_lay
from fedmira.fleet import (
    RULES,
    SHARED,
    Joined,
    Joining,
    JoinSettings,
    Pool,
    check_enough,
    rows_of_run,
)
from fedmira.methods import TwoLevel
from fedmira.methods.parts.averaging import COMMON
from fedmira.model import BaseModel, LoraKind, check_ids, load_tokenizer
from fedmira.records import check_new, new_folder
from fedmira.report import write_joining
from fedmira.runs import AdapterCards, CheckpointFolder, RunFolder
from fedmira.seeds import seed_for
from fedmira.studies.saved import SavedAdapters, quick_budget, reload_adapters

__all__ = ["JoinedClient", "join_run", "pool_of"]

STEPS = 10
"""Local steps where nothing is said."""

_READ = ("source", "column", "columns", "instruction", "ignore", "bad_rows", "bad_rows_share")
_READ_ELSEWHERE = ("split", "split_list", "input_limit")
_COUNTS = ("steps", "epochs", "steps_per_row", "optimizer_state")


@dataclass(frozen=True)
class JoinedClient:
    """What a newcomer got.

    Attributes:
        folder: an adapter that plain PEFT loads, with its card, join.json and join.html.
        client: its name.
        adapter: its factors.
        figures: as in join.json.
    """

    folder: Path
    client: str
    adapter: Adapter
    figures: Mapping[str, Any]

    @property
    def page(self) -> Path:
        """Whom the newcomer resembles, which starts were tried, and the losses before and after."""
        return self.folder / "join.html"

    def _repr_html_(self) -> str:
        """For notebooks: how it started, and the path of the page."""
        return (
            f"<p>{html.escape(self.client)} starts from {html.escape(self.figures['start'])}; "
            f"report: <code>{html.escape(str(self.page))}</code></p>"
        )


def join_run(
    run: Path,
    client: str,
    data: Path | ObjectRows,
    output: Path | None = None,
    *,
    steps: int | None = None,
    start: str | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
    base: BaseModel | None = None,
) -> JoinedClient:
    """Score, choose, train, and write the newcomer's folder.

    Args:
        run: a run folder; nothing is written there.
        client: what the newcomer is called.
        data: its rows: a file or a folder, or rows that are objects.
        output: a new folder; by default beside the run, with the client's name behind the run's.
        steps: local steps; 0 keeps the start as it is, and so do rows that show that training
            harms.
        start: one of `RULES`, which is trained in any case; None lets the rows choose.
        settings: dotted key -> value, or KEY=VALUE texts: how the rows are read, and [local].
        base: of a run whose base was an object, or one that is loaded already.

    Raises:
        InputError: something cannot be used; nothing was trained or written.
        RunError: training diverges.
    """
    output = output or run.with_name(f"{run.resolve().name}-{client}")
    config = _settings(run, client, steps, start, settings)
    check_new(output)
    if output.resolve().is_relative_to(run.resolve()):
        raise RunFolderError(f"{output}: lies within the run, which stays as it is; choose another")
    newcomer = _rows(config, client, data, "data.source" in _keys(settings), base)
    saved = reload_adapters(run, base)
    check_ids(saved.kind.base, {client: newcomer.data.rows})
    pool, made = pool_of(saved, client)
    training = JoinSettings(
        config.local, STEPS if steps is None else steps, config.seed, quick_budget(saved)
    )
    joining = Joining(newcomer, pool, saved.kind, training)
    joined = joining.join(start)
    figures = _figures(saved, joining, joined, made, given=start is not None)
    with new_folder(output) as aside:
        saved.kind.write(aside, joined.adapter)
        card = _card(saved, config, newcomer, figures)
        replace_file(aside / "README.md", card, lasting=False)
        write_joining(aside, figures)
    return JoinedClient(output, client, joined.adapter, figures)


def pool_of(saved: SavedAdapters, client: str) -> tuple[Pool, str]:
    """What a newcomer may start from, and what the generalist is, in words.

    The generalist is the common part of `two-level`, as the run's last checkpoint has it: what the
    method would send to a client that has trained nothing yet. Other runs, and those whose
    checkpoint is gone, have the mean of all adapters as products, by training rows.

    Args:
        saved: what the run has saved.
        client: the newcomer, whose rank is drawn by its name where the run's ranks are.

    Raises:
        ConfigError: the adapters are not LoRA.
    """
    config, kind = saved.config, saved.kind
    if not isinstance(kind, LoraKind):
        raise ConfigError(_other_kind(config))
    # Ranks that are given by name are those of other clients.
    drawn = config.adapter.model_copy(update={"ranks": {}, "rank_types": {}})
    rank = client_ranks(drawn, [client], kind.targets, config.seed)[client]
    fresh = kind.starts({**saved.ranks, client: rank}, seed_for(config.seed, "start"))[client]
    scales = {name: kind.scale(own) for name, own in saved.ranks.items()}
    scale, common = kind.scale(rank), _common_part(saved)
    if common is not None:
        wide = next(len(part) for name, part in common.items() if ".lora_A." in name)
        parts, weights, own, made = (
            [common],
            [1.0],
            [kind.scale(wide)],
            "the common part of the run",
        )
    else:
        rows = rows_of_run(saved.path)
        known = all(rows.get(name) for name in scales)
        shares = [rows[name] if known else 1 for name in scales]
        parts, own = [saved.adapters[name] for name in scales], list(scales.values())
        weights = [share / sum(shares) for share in shares]
        made = f"the mean of {len(parts)} adapters, {'by training rows' if known else 'all alike'}"
    generalist = mix(parts, weights, own, rank, scale, fresh, split="turned").adapter
    return Pool(saved.adapters, scales, generalist, fresh, rank, scale), made


def _common_part(saved: SavedAdapters) -> Adapter | None:
    """The common part of a run of two levels, where its checkpoint is there."""
    if not isinstance(saved.config.algorithm, TwoLevel):
        return None
    checkpoint = CheckpointFolder(RunFolder(saved.path).checkpoint).load()
    return checkpoint.state.adapters.get(COMMON) if checkpoint else None


def _other_kind(config: Config) -> str:
    return (
        f"join: the run's adapters are of kind {config.adapter.kind!r}, which cannot be mixed; a "
        "newcomer joins runs with adapter.kind = 'lora'"
    )


def _settings(
    run: Path,
    client: str,
    steps: int | None,
    start: str | None,
    given: Mapping[str, Any] | Sequence[str],
) -> Config:
    """The run's settings with those of the newcomer on top.

    Raises:
        InputError: the name is taken or cannot be one, or a setting is not the newcomer's to make.
    """
    folder = RunFolder.reopen(run)
    names = list(folder.read_json("adapters/index.json"))
    if problem := id_problem(client):
        raise ConfigError(problem)
    if taken := [name for name in names if name.casefold() == client.casefold()]:
        raise ConfigError(
            f"join: there is a client {taken[0]!r} in {run} already; give the newcomer another name"
        )
    if steps is not None and steps < 0:
        raise ConfigError(f"join: steps is {steps}; must be 0 or more")
    if start is not None and start not in RULES:
        raise ConfigError(f"join: start is {start!r}; must be one of {', '.join(RULES)}")
    problems = [
        f"join: {key} is not the newcomer's to set: its rows are read in the run's prompt form, "
        "and it trains as the run's clients did; of [data] it may set how rows are read "
        f"({', '.join((*_READ, *_READ_ELSEWHERE))}), and [local] but for the number of steps"
        for key in _keys(given)
        if not _may_set(key)
    ]
    if problems:
        raise ConfigError(problems)
    config = where_they_lay(load_config(run / "config.toml"), folder.read_json("run.json"))
    if not config.adapter.low_rank:
        raise ConfigError(_other_kind(config))
    if isinstance(given, Mapping):
        return with_settings(config, given)
    return with_overrides(config, given) if given else config


def _keys(given: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """The keys of a mapping, or of KEY=VALUE texts."""
    return [each.partition("=")[0].strip() for each in given]


def _may_set(key: str) -> bool:
    section, _, name = key.partition(".")
    if section == "local":
        return name not in _COUNTS
    return section == "data" and name.partition(".")[0] in (*_READ, *_READ_ELSEWHERE)


def _rows(
    config: Config,
    client: str,
    data: Path | ObjectRows,
    chosen: bool,
    base: BaseModel | None,
) -> Newcomer:
    """The newcomer's rows, in the prompt form of the run.

    Raises:
        DataError: they cannot be read, or are too few.
    """
    changes: dict[str, Any] = {"sha256": None}
    if isinstance(data, ObjectRows):
        changes |= {"source": "object", "path": ""}
    else:
        # Whatever the run was made of, a newcomer has files of its own.
        changes |= {"source": config.data.source if chosen else "jsonl", "path": str(data)}
    read = config.data.model_copy(update=changes)
    tokenizer = base.tokenizer if base else load_tokenizer(config.model)
    rows = data if isinstance(data, ObjectRows) else None
    newcomer = load_newcomer(read, config.seed, tokenizer, client, rows)
    weighed = about_advantages([newcomer.data], config.local.advantage_temperature, required=False)
    newcomer = replace(newcomer, notes=(*newcomer.notes, *weighed))
    check_enough(newcomer)
    return newcomer


def _figures(
    saved: SavedAdapters, joining: Joining, joined: Joined, generalist: str, *, given: bool
) -> dict[str, Any]:
    """Everything that the page tells, for JSON."""
    data, pool, steps = joining.newcomer.data, joining.pool, joining.settings.steps
    judged = joined.judgement
    return {
        "client": data.client_id,
        "run": saved.path.resolve().name,
        "method": saved.config.algorithm.name,
        "base_sha256": saved.kind.base.sha256,
        "sha256": content_hash(joined.adapter),
        "rank": pool.rank,
        "steps": joined.steps,
        "steps_asked": steps,
        "learning_rate": joining.settings.local.learning_rate,
        "rows": {
            "train": len(data.train),
            "choose": sum(len(group) for group in joining.groups),
            "held_out": len(data.test),
        },
        "start": joined.rule,
        "start_given": given,
        "start_weights": {_shown(name): weight for name, weight in joined.weights.items()},
        "generalist": generalist,
        "base_loss": _finite(joined.fresh_loss),
        "resembles": [
            {
                "client": _shown(score.name),
                "loss": _finite(score.loss),
                "behind": _finite(score.behind),
                "error": _finite(score.error),
            }
            for score in joined.scores
        ],
        "tried": [
            {
                "start": trial.rule,
                "meaning": RULES[trial.rule],
                "loss_of_start": _finite(trial.start),
                "loss_trained": _finite(trial.trained),
            }
            for trial in joined.trials
        ],
        "against_fresh": None
        if judged is None
        else {
            "standing": str(judged.standing),
            "difference": _finite(judged.difference),
            "margin": _finite(judged.margin),
        },
        "held_out": {name: _finite(loss.per_token) for name, loss in joined.held_out.items()},
        "training": None if joined.training is None else list(map(_finite, joined.training)),
        "notes": [*joining.newcomer.notes, *_remarks(joining, joined)],
    }


def _remarks(joining: Joining, joined: Joined) -> list[str]:
    """What is not known, or speaks against what was done, a sentence each."""
    told = []
    scored, rows = sum(len(group) for group in joining.groups), len(joining.newcomer.groups)
    if scored < rows:
        told.append(f"{scored} of {rows} rows score and choose, drawn at random; all of them train")
    chosen = next((trial for trial in joined.trials if trial.rule == joined.rule), None)
    steps = joining.settings.steps
    if chosen and joined.steps < steps:
        told.append(
            f"the start is kept as it is: on rows that neither chose nor trained it has "
            f"{chosen.start:.3f}, and the best of what {steps} local steps made "
            f"{min(trial.trained for trial in joined.trials):.3f}; --start {joined.rule} trains "
            "all the same"
        )
    elif chosen and steps and chosen.trained > chosen.start:
        told.append(
            f"on rows that neither chose nor trained, {steps} local steps made the loss of this "
            f"start greater ({chosen.start:.3f} before, {chosen.trained:.3f} after): fewer steps "
            "may be better"
        )
    if not joined.held_out:
        told.append(
            "no rows were set aside (test.jsonl), so no loss of the finished adapter is known"
        )
    return told


def _card(
    saved: SavedAdapters, config: Config, newcomer: Newcomer, figures: Mapping[str, Any]
) -> str:
    """README.md."""
    data, own = newcomer.data, RULES[figures["start"]]
    made = (
        f"Made by fedmira for a client that came to a finished run of `{figures['method']}`: it "
        f"started from {own} and trained alone for {figures['steps']} local steps on "
        f"{len(data.train)} rows."
    )
    weights = figures["start_weights"]
    about = ["## Start", "Shares of what the start was made of; it was cut to the adapter's rank."]
    lines = [f"| {name} | {weight:.3f} |" for name, weight in weights.items()]
    about.append("\n".join(["| adapter | share |", "|---|---|", *lines]))
    losses = figures["held_out"]
    if losses:
        told = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None)
        about += [
            "## Figures",
            f"Nats per response token on {len(data.test)} held-out rows: {told}.",
        ]
    cards = AdapterCards(config, saved.kind.base)
    return cards.told(
        data.client_id, made, data.shared_prompt, about if weights else about[3:], figures["sha256"]
    )


def _shown(name: str) -> str:
    return "the generalist" if name == SHARED else name


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
