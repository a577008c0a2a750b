"""Every preset parses, says what it is and how to run it, and holds the published numbers."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fedmira.config import (
    Config,
    dump_config,
    load_config,
    preset_description,
    preset_names,
    preset_path,
)
from fedmira.data.sources.natural_instructions import FEWEST_ROWS
from fedmira.errors import ConfigError
from fedmira.methods import Mira
from fedmira.studies import plan_methods

BUNDLED_CONTEXT = 512
"""Tokens that the bundled base reads."""

every_preset = pytest.mark.parametrize("name", preset_names())
every_preset_on_files = pytest.mark.parametrize(
    "name", [name for name in preset_names() if name != "demo"]
)


def test_the_presets_are_found() -> None:
    assert {
        "mira-ni",
        "mira-paper-ni",
        "mira-paper-dolly",
        "fedit-ni",
        "fedit-dolly",
        "local-ni",
    } <= set(preset_names())


@every_preset
def test_a_preset_parses_and_differs_from_the_defaults(name: str) -> None:
    assert load_config(preset=name) != Config()


@every_preset
def test_a_preset_opens_with_what_it_is_and_the_command_that_runs_it(name: str) -> None:
    description, command, *_ = preset_path(name).read_text(encoding="utf-8").splitlines()
    assert description == f"# {preset_description(name)}"
    assert preset_description(name).endswith(".")
    assert command.startswith(
        (
            f"# fedmira run --preset {name} --set data.path=",
            f"# fedmira compare --preset {name} ",
            f"# fedmira decide --preset {name}",
        )
    )


def test_the_comparisons_of_the_reproduction_page_can_be_run() -> None:
    text = (
        (Path(__file__).parents[2] / "docs" / "reproduction.md")
        .read_text(encoding="utf-8")
        .replace("\\\n", " ")
    )
    commands = re.findall(r"^    fedmira compare (.*)$", text, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        words = shlex.split(command)
        options = list(zip(words[::2], words[1::2], strict=True))
        given = {option: value for option, value in options}
        config = load_config(
            preset=given["--preset"],
            overrides=[value for option, value in options if option == "--set"],
        )
        variants = dict(value.split("=", 1) for option, value in options if option == "--variant")
        plans = plan_methods(
            config,
            given["--algorithms"].split(","),
            {name: sets.split(";") for name, sets in variants.items()},
        )
        assert given.get("--reference", "local") in plans


@every_preset
def test_the_variants_that_a_preset_prints_can_be_compared_with_it(name: str) -> None:
    config = load_config(preset=name, overrides=[] if name == "demo" else ["data.path=here"])
    printed = re.findall(
        r'--variant "([^"=]+)=([^"]*)"',
        preset_path(name).read_text(encoding="utf-8").replace("\n# ", " "),
    )
    plans = plan_methods(
        config, [], {variant: settings.split(";") for variant, settings in printed}
    )
    assert list(plans) == [variant for variant, _ in printed]
    context = BUNDLED_CONTEXT if config.model.base == "bundled" else None
    assert all(
        context is None or plan.data.max_length + plan.adapter.positions <= context
        for plan in plans.values()
    )


@every_preset_on_files
def test_the_data_path_of_a_preset_is_left_to_the_user(name: str) -> None:
    assert load_config(preset=name).data.path == ""
    assert load_config(preset=name, overrides=["data.path=here"]).data.path == "here"


@pytest.mark.parametrize(
    ("name", "coefficient"),
    [("mira-paper-ni", 0.5), ("mira-paper-dolly", 0.01), ("mira-paper-dolly-gpt2", 0.8)],
)
def test_the_published_server_step_is_learning_rate_times_epochs_times_lambda(
    name: str, coefficient: float
) -> None:
    config = load_config(preset=name)
    assert isinstance(config.algorithm, Mira)
    assert config.algorithm.server_step == pytest.approx(
        config.local.learning_rate * config.local.epochs * coefficient
    )


@pytest.mark.parametrize(
    "name",
    ["mira-paper-ni", "mira-paper-dolly", "fedit-ni", "fedit-dolly", "local-ni", "local-dolly"],
)
def test_the_published_runs_share_model_adapter_and_federation(name: str) -> None:
    config = load_config(preset=name)
    assert (
        config.adapter.rank,
        config.adapter.alpha,
        config.adapter.dropout,
        config.adapter.targets,
    ) == (16, 8, 0.05, ("q_proj",))
    assert (config.local.batch_size, config.local.epochs, config.local.max_grad_norm) == (8, 5, 5.0)
    assert (config.rounds.count, config.rounds.participation, config.seed) == (60, 0.1, 42)
    assert config.model.base == "datajuicer/LLaMA-1B-dj-refine-150B"


@pytest.mark.parametrize("data", ["ni", "dolly"])
def test_the_local_presets_differ_from_the_published_ones_in_the_algorithm_only(data: str) -> None:
    paper, local = load_config(preset=f"mira-paper-{data}"), load_config(preset=f"local-{data}")
    defaults = Config()
    same = {"algorithm": defaults.algorithm, "graph": defaults.graph}
    assert dump_config(paper.model_copy(update=same)) == dump_config(local.model_copy(update=same))


@pytest.mark.parametrize("data", ["ni", "dolly"])
def test_the_settings_on_the_bundled_base_are_the_published_ones(data: str) -> None:
    paper, bundled = (
        load_config(preset=f"mira-paper-{data}"),
        load_config(preset=f"paper-{data}-bundled"),
    )
    assert bundled.model.base == "bundled" and bundled.data.max_length == BUNDLED_CONTEXT - 20
    for section in ("adapter", "algorithm", "graph", "local", "rounds", "seed"):
        assert getattr(bundled, section) == getattr(paper, section)


def test_fedprompt_differs_from_fedptuning_in_the_adapter_only() -> None:
    encoder, prompt = load_config(preset="fedptuning-ni"), load_config(preset="fedprompt-ni")
    assert (prompt.adapter.kind, prompt.adapter.virtual_tokens) == (
        "prompt",
        encoder.adapter.virtual_tokens,
    )
    assert prompt.model_copy(update={"adapter": encoder.adapter}) == encoder


@pytest.mark.parametrize("data", ["ni", "dolly"])
def test_fedptuning_has_the_federation_of_fedit_and_its_own_adapter(data: str) -> None:
    fedit, prompt = load_config(preset=f"fedit-{data}"), load_config(preset=f"fedptuning-{data}")
    assert (prompt.adapter.kind, prompt.adapter.virtual_tokens, prompt.adapter.encoder_hidden) == (
        "p-tuning",
        20,
        128,
    )
    assert (prompt.local.learning_rate, prompt.local.weight_decay, prompt.local.epochs) == (
        1e-3,
        1e-2,
        5,
    )
    for section in ("model", "data", "algorithm", "rounds", "seed"):
        assert getattr(prompt, section) == getattr(fedit, section)


def test_gpt2_large_has_its_own_rank_batch_and_rounds() -> None:
    for name in ("mira-paper-dolly-gpt2", "fedit-dolly-gpt2"):
        config = load_config(preset=name)
        assert (
            config.adapter.rank,
            config.local.batch_size,
            config.rounds.count,
            config.local.learning_rate,
        ) == (8, 4, 40, 3e-5)
        assert config.adapter.targets == ("c_attn", "c_proj")


def test_flexloras_presets_differ_in_the_ranks_only() -> None:
    fixed, drawn = load_config(preset="flexlora-ni"), load_config(preset="flexlora-types-ni")
    assert (fixed.adapter.rank, drawn.adapter.rank_distribution, drawn.adapter.type_ranks) == (
        8,
        "heavy-tail-light",
        (8, 30, 200),
    )
    ranks = {"rank": 16, "rank_distribution": "one"}
    assert fixed.adapter.model_copy(update=ranks) == drawn.adapter.model_copy(update=ranks)
    assert fixed.model_copy(update={"adapter": drawn.adapter}) == drawn


def test_fedkseed_has_the_published_steps_seeds_and_sampling_without_clipping() -> None:
    config = load_config(preset="fedkseed-ni")
    assert (
        config.local.steps,
        config.local.batch_size,
        config.local.zeroth_seeds,
        config.local.zeroth_width,
    ) == (200, 1, 4096, 5e-4)
    assert (config.rounds.count, config.rounds.participation, config.seed) == (40, 0.05, 42)
    assert (config.data.sample_fraction, config.data.input_limit) == (0.2, 1024)
    assert config.data.min_rows == int(0.2 * FEWEST_ROWS), (
        "20 rows are asked for before they are drawn, and no further number after"
    )
    assert config.local.max_grad_norm == config.local.weight_decay == 0
    assert config.model.base == "bundled" and config.data.max_length == BUNDLED_CONTEXT


def test_an_unknown_preset_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match="preset 'mira-in' does not exist; did you mean 'mira-ni'"
    ):
        preset_description("mira-in")
