"""The card in each saved adapter folder.

What the adapter is, the exact prompt it was trained with, and how to load it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fedmira.config import Config
from fedmira.data import PROMPTS, Example, make_encoder
from fedmira.messages import ClientId
from fedmira.metrics import metrics
from fedmira.model import BaseModel, end_tokens
from fedmira.shown import json_text, markdown_text

__all__ = ["AdapterCards"]

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

_FIGURES = {
    "rank": "LoRA rank; 0 for adapters of other kinds",
    "rounds_trained": "rounds in which the client's training was used",
    "parameters": "numbers in the adapter that is federated",
    "trained_parameters": "those of them that local training moves",
}
"""Keys of index.json and what they mean, in the order of the card; the metrics follow."""

_CONVERSATIONS = {
    "alpaca": "Of a conversation, the last user message is the instruction, and the other messages "
    "are the input, each as `Role: text`, "
    "separated by blank lines.",
    "plain": "A conversation is its messages, each as `Role: text`, separated by blank lines, and "
    "a last block `Assistant:`.",
    "chat": "A conversation is given to the template as it is.",
}


class AdapterCards:
    """Writes the cards of a run.

    Equal runs get equal cards, so there is no time in them and no path.

    Args:
        config: of the run.
        base: that the adapters belong to.
    """

    def __init__(self, config: Config, base: BaseModel) -> None:
        self._config, self._base = config, base
        self._form = config.data.prompt
        self._encoder = make_encoder(config.data, base.tokenizer)
        self._front = list(self._encoder.leading)
        self._templates = (
            {}
            if self._form == "chat"
            else {text: _template(config, base, text) for text in ("", "{input}")}
        )

    def text(self, client: ClientId, entry: Mapping[str, Any], row: Mapping[str, Any]) -> str:
        """The card of one client's adapter, as Markdown.

        Args:
            client: its id.
            entry: what index.json says of it.
            row: its line of metrics/clients.csv.
        """
        figures, shared = {**entry, **entry["metrics"]}, entry.get("prompt", {})
        meanings = _FIGURES | {metric.name: metric.meaning for metric in metrics()}
        lines = [
            f"| `{key}` | {_number(figures[key])} | {meaning} |"
            for key, meaning in meanings.items()
            if key in figures
        ]
        made = (
            f"Made by fedmira with `{self._config.algorithm.name}`: {self._chosen()}. "
            f"Trained on {row['train_rows']} rows, measured on "
            f"{row['test_rows']} test rows of this client."
            f"{_about_privacy(entry.get('privacy'))}"
        )
        about = [
            "## Figures",
            "From index.json in the folder above. Losses are nats per response token on "
            "the client's own test rows; lower is better.",
            "\n".join(["| key | value | meaning |", "|---|---|---|", *lines]),
        ]
        return self.told(client, made, shared, about, entry["sha256"])

    def told(
        self,
        client: ClientId,
        made: str,
        shared: Mapping[str, Any],
        about: Sequence[str],
        sha256: str,
    ) -> str:
        """A card with words of one's own, such as that of a client that came later.

        Args:
            client: its id.
            made: how the adapter was made, in sentences.
            shared: what the prompts of its training rows share.
            about: paragraphs behind base, prompt and code.
            sha256: of the adapter's tensors.
        """
        parts = [
            self._head(),
            f"# Adapter of {markdown_text(client)}",
            f"{made} An adapter can give away some "
            "of the rows that it learned from; pass it on with "
            "the care that the rows need.",
            self._about_base(),
            "## Prompt",
            self._about_prompt(shared),
            "## Load it",
            "With plain PEFT, and no fedmira; what stands in braces or in capitals is for "
            "you to fill in.",
            f"```python\n{self._code(shared)}\n```",
            *about,
            f"`sha256` of the adapter's tensors: {sha256}",
        ]
        return "\n\n".join(parts) + "\n"

    def _head(self) -> str:
        """What the hub reads: the base where it is a hub id."""
        named = [f"base_model: {json.dumps(self._base.name)}"] if self._from_hub else []
        return "\n".join(
            ["---", *named, "library_name: peft", "pipeline_tag: text-generation", "---"]
        )

    @property
    def _from_hub(self) -> bool:
        return (
            self._base.location == self._base.name
            and _HUB_ID.fullmatch(self._base.name) is not None
        )

    def _chosen(self) -> str:
        if self._config.evaluation.select == "best":
            return (
                "the adapter of the round with the lowest loss on the client's own validation rows"
            )
        return "the adapter after the last complete round"

    def _about_base(self) -> str:
        base = self._base
        if base.name == "bundled":
            name = "`bundled`, the small model in the package, in the folder `fedmira/bundled/base`"
        else:
            name = (
                f"`{base.name}` of the hub"
                if self._from_hub
                else f"a local folder called `{_folder_name(base)}`"
            )
        stored = self._config.model.quantization
        quantised = "" if stored == "none" else f", quantised to {stored}"
        return (
            f"Base: {name}; it computed in {_dtype(base)}{quantised}. sha256 over names, "
            "shapes, number types and bytes of its weights: "
            f"{base.sha256}\n\n"
            "`base_model_name_or_path` in adapter_config.json is where the base lay on the "
            "machine that made this folder. Elsewhere, "
            "change it, or load the base yourself as below. On another base the adapter is "
            "worthless: compare the sha256 "
            "(docs/python.md of fedmira says how)."
        )

    def _about_prompt(self, shared: Mapping[str, Any]) -> str:
        most = self._config.data.max_length
        special = (
            f"the token ids {self._front}, then the prompt's own"
            if self._front
            else "the prompt's own token ids alone"
        )
        if self._form == "chat":
            form = (
                "The form is `chat`: the tokenizer's own chat template, up to where the "
                "assistant begins. Instruction and input are "
                "one user message, with a blank line between them; without an input it is "
                "the instruction alone."
            )
            if not self._template_opens:
                form += (
                    " Under `add_generation_prompt` this template writes something else than in "
                    "front of an answer, or asks for the time; the adapter was trained on the text "
                    "that the code below holds, which ends where an answer begins."
                )
        else:
            form = (
                f"The form is `{self._form}`. As Python strings, so that every space and "
                "line end can be seen; with an input:\n\n"
                f"    {self._templates['{input}']}\n\nwithout one:\n\n    {self._templates['']}"
            )
        return (
            f"{form}{_about_shared(shared)}\n\n{_CONVERSATIONS[self._form]} "
            "Instructions other than those of the client's rows are new to the adapter.\n\n"
            f"The model reads {special}, with no token behind them, and writes the answer "
            f"and {self._end}. "
            f"In training a row had at most {most} tokens, prompt and answer together "
            "(`data.max_length`)."
        )

    @property
    def _silent(self) -> set[int]:
        """Ids that say nothing in an answer: its ends, padding, and the start of a sequence."""
        tokenizer = self._base.tokenizer
        return {*end_tokens(self._base), tokenizer.pad_token_id, tokenizer.bos_token_id} - {None}

    @property
    def _template_opens(self) -> bool:
        """Whether the tokenizer's template alone writes the prompt of training."""
        template = self._encoder.template
        return template is not None and template.opens_answers and not self._config.data.clock

    @property
    def _end(self) -> str:
        template = self._encoder.template
        if template is None or template.turn_end is None:
            return "the end-of-sequence token"
        return f"what the template ends a turn with (token id {template.turn_end})"

    def _chat_code(self, shared: Mapping[str, Any]) -> str:
        """A line that makes the prompt of a request in the chat form."""
        request = "{instruction}\n\n{input}"
        system = shared.get("system") if shared.get("conversation") else ""
        tools = str(shared.get("tools", "")) if shared.get("conversation") else ""
        template = self._encoder.template
        assert template is not None, "the form is chat"
        asked = (*([("system", str(system))] if system else []), ("user", request))
        example = Example("", "", "", messages=asked, tools=tools)
        if not self._template_opens:
            return f"prompt = {_python(template.prompt(example))}"
        messages, offered = template.asked(example)
        functions = f"tools={_python(offered)}, " if offered else ""
        return (
            f"prompt = tokenizer.apply_chat_template({_python(messages)}, {functions}"
            "tokenize=False, add_generation_prompt=True)"
        )

    def _joined(self) -> str:
        """A slice that takes the last tokens off a prompt that would be joined with the answer."""
        template = self._encoder.template
        if template is None:
            return ""
        probe = Example("a", "", "")
        text = template.prompt(probe)
        whole = self._base.tokenizer(text, add_special_tokens=False)["input_ids"]
        joined = len(whole) - len(self._encoder.prompt(probe))
        return f"[:-{joined}]" if joined > 0 else ""

    def _code(self, shared: Mapping[str, Any]) -> str:
        if self._form == "chat":
            prompt = self._chat_code(shared)
        else:
            template = self._templates["{input}"]
            prompt = f'prompt = {template}.format(instruction="{{instruction}}", input="{{input}}")'
        lines = [
            "import torch",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig",
            "",
            'folder, base = "THIS FOLDER", "FOLDER OR HUB ID OF THE BASE"',
            "tokenizer = AutoTokenizer.from_pretrained(base)",
            f'plain = AutoModelForCausalLM.from_pretrained(base, dtype="{_dtype(self._base)}")',
            "plain.generation_config = GenerationConfig()  # the base's own penalties and sampling "
            "do not act",
            "model = PeftModel.from_pretrained(plain, folder)",
            prompt,
            f"ids = torch.tensor([{self._front} + tokenizer(prompt, "
            f"add_special_tokens=False).input_ids{self._joined()}])",
            "answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), "
            "max_new_tokens="
            f"{self._config.evaluation.max_new_tokens}, do_sample=False, "
            f"eos_token_id={end_tokens(self._base)}, "
            f"pad_token_id={self._base.tokenizer.pad_token_id})",
            f"ends = {sorted(self._silent)}  # any other special token may be the answer",
            "said = [token for token in answer[0, ids.shape[1] :].tolist() if token not in ends]",
            "print(tokenizer.decode(said).strip())",
        ]
        return "\n".join(lines)


def _template(config: Config, base: BaseModel, material: str) -> str:
    """The prompt form as a Python string, with its fields in braces."""
    return json_text(
        PROMPTS[config.data.prompt](Example("{instruction}", material, ""), base.tokenizer)
    )


def _about_shared(shared: Mapping[str, Any]) -> str:
    """What stands in the prompt of every row of the client."""
    named = {
        "system": "system message",
        "instruction": "instruction",
        "tools": "functions that may be called, as a JSON list",
    }
    return "".join(
        f"\n\nAll training rows of the client have this {title}:\n\n    {_python(shared[key])}"
        for key, title in named.items()
        if shared.get(key)
    )


def _python(value: object) -> str:
    """Texts and lists of them as Python writes them, with every space and line end."""
    return json_text(value)


def _folder_name(base: BaseModel) -> str:
    """The last part of the path, which tells nothing of the machine."""
    return markdown_text(re.split(r"[/\\]", base.location.rstrip("/\\"))[-1])


def _dtype(base: BaseModel) -> str:
    return str(base.dtype).removeprefix("torch.")


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _about_privacy(promised: Mapping[str, Any] | None) -> str:
    """What an adapter promises of the rows behind it; "" where it promises nothing."""
    if promised is None:
        return ""
    spent, each = promised["epsilon"], {"row": "training row", "client": "client"}[promised["kind"]]
    if spent is None or not promised["secret"]:
        reason = "it had no noise" if spent is None else "whoever knows the seed knows the noise"
        return f" It was trained as if for privacy, and promises none: {reason}."
    return (
        f" Each {each} behind it is hidden by differential privacy with epsilon {spent:.3g} and "
        f"delta {promised['delta']:g}; run.json says what is covered and what is not."
    )
