"""Turns a client's rows into token ids.

Prompt and response apart, cut to a length, with everything that was cut counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedmira.data.examples import Example
from fedmira.data.partition import ClientRows
from fedmira.data.problems import Problems
from fedmira.data.prompts import PROMPTS
from fedmira.data.split import Split
from fedmira.data.token_cache import TokenCache
from fedmira.data.tokenizer import Tokenizer
from fedmira.errors import DataError

__all__ = ["HEADER_TOKENS", "ClientData", "EncodedExample", "Encoder"]

HEADER_TOKENS = 16
_BATCH = 2048


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """One row as tokens; only the response carries loss.

    Attributes:
        prompt: with the leading special tokens that the tokenizer itself adds; never empty.
        response: ends with the end-of-sequence token unless it was cut; never empty.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ClientData:
    """Everything a client trains and is evaluated on.

    Attributes:
        client_id: safe as a folder name.
        references: the raw test responses, one for each test row.
        instruction: the instruction that all training rows share, "" where they differ.
        truncated_prompts, truncated_responses: rows that were cut to `data.max_length`, of all
            parts.
        duplicates: copies of rows that were dropped.
        overlaps: rows that were dropped because their prompt stands in the source's own test or
            validation rows.
    """

    client_id: str
    task: str
    category: str
    train: tuple[EncodedExample, ...]
    validation: tuple[EncodedExample, ...]
    test: tuple[EncodedExample, ...]
    references: tuple[str, ...]
    instruction: str = ""
    truncated_prompts: int = 0
    truncated_responses: int = 0
    duplicates: int = 0
    overlaps: int = 0

    @property
    def rows(self) -> tuple[EncodedExample, ...]:
        """The rows of all three parts."""
        return (*self.train, *self.validation, *self.test)

    @property
    def train_tokens(self) -> int:
        """Prompt and response tokens of all training rows."""
        return sum(len(row.prompt) + len(row.response) for row in self.train)

    @property
    def train_response_tokens(self) -> int:
        """Tokens that carry loss in one pass over the training rows."""
        return sum(len(row.response) for row in self.train)


class Encoder:
    """A tokenizer, a prompt template and a length.

    Args:
        tokenizer: any Hugging Face tokenizer.
        prompt: a key of `PROMPTS`.
        max_length: most tokens of a row, prompt and response together.

    Attributes:
        longest_row: tokens of the longest row that was encoded so far, before it was cut.

    Raises:
        DataError: the tokenizer has no end-of-sequence token, or no chat template where one is
            asked for.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str, max_length: int) -> None:
        name = tokenizer.name_or_path
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"tokenizer {name!r} has no end-of-sequence token, so a response would "
                "never end; set its eos_token"
            )
        self._tokenizer = tokenizer
        self._render = PROMPTS[prompt]
        self._max_length = max_length
        self.longest_row = 0
        self._cache = TokenCache(tokenizer)
        self._ids: dict[int, int] = {}
        self._end: int = tokenizer.eos_token_id
        # A chat template writes the special tokens itself.
        self._start: tuple[int, ...] = () if prompt == "chat" else _leading_tokens(tokenizer)
        if prompt == "chat":
            self._render(Example("probe", "", ""), tokenizer)

    def prompt(self, example: Example) -> tuple[int, ...]:
        """The prompt's tokens at full length, for generation.

        Raises:
            DataError: the chat template refuses the messages.
        """
        return (*self._start, *self._tokens([self._render(example, self._tokenizer)])[0])

    def encode(
        self, rows: Sequence[Example], problems: Problems
    ) -> tuple[tuple[EncodedExample, ...], int, int]:
        """Encodes rows and counts those whose prompt and whose response was cut.

        A row longer than `max_length` keeps max_length // 2 tokens of its response, or more where
        the prompt leaves room, without the end-of-sequence token; then the prompt loses tokens from
        its middle and keeps its head and its last `HEADER_TOKENS`. Rows with a problem are noted
        and left out.
        """
        encoded: list[EncodedExample] = []
        prompts_cut = responses_cut = 0
        for start in range(
            0, len(rows), _BATCH
        ):  # bounds the memory that the tokenizer takes for one call
            batch = self._rendered(rows[start : start + _BATCH], problems)
            prompts = self._tokens([text for _, text in batch])
            responses = self._tokens([row.output for row, _ in batch])
            for (row, _), prompt, response in zip(batch, prompts, responses, strict=True):
                if not response or not (prompt or self._start):
                    problems.add(
                        f"{row.where or repr(row.instruction[:40])}: "
                        f"{'prompt' if response else 'response'} encodes to no token"
                    )
                    continue
                whole_prompt, whole_response = (*self._start, *prompt), (*response, self._end)
                self.longest_row = max(self.longest_row, len(whole_prompt) + len(whole_response))
                example = self._fitted(whole_prompt, whole_response)
                prompts_cut += len(example.prompt) < len(whole_prompt)
                responses_cut += len(example.response) < len(whole_response)
                encoded.append(example)
        return tuple(encoded), prompts_cut, responses_cut

    def encode_client(self, client: ClientRows, split: Split, problems: Problems) -> ClientData:
        """Encodes the three parts of a client."""
        train, *train_cut = self.encode(split.train, problems)
        validation, *validation_cut = self.encode(split.validation, problems)
        test, *test_cut = self.encode(split.test, problems)
        prompts_cut, responses_cut = (
            sum(cut) for cut in zip(train_cut, validation_cut, test_cut, strict=True)
        )
        return ClientData(
            client.client_id,
            client.task,
            client.category,
            train,
            validation,
            test,
            tuple(row.output for row in split.test),
            _shared_instruction(split.train),
            prompts_cut,
            responses_cut,
            split.duplicates,
            split.overlaps,
        )

    def _rendered(self, rows: Sequence[Example], problems: Problems) -> list[tuple[Example, str]]:
        rendered = []
        for row in rows:
            try:
                rendered.append((row, self._render(row, self._tokenizer)))
            except DataError as error:
                problems.add(str(error))
        return rendered

    def _tokens(self, texts: list[str]) -> list[tuple[int, ...]]:
        if not texts:
            return []
        encoded = self._cache.ids(texts, self._tokenise)
        # One object per distinct id in place of one per token: a quarter of the memory.
        return [tuple(map(self._ids.setdefault, row, row)) for row in encoded]

    def _tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        # verbose=False: lengths are this module's business, not the tokenizer's warning's.
        encoded = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return [list(row) for row in encoded["input_ids"]]

    def _fitted(self, prompt: tuple[int, ...], response: tuple[int, ...]) -> EncodedExample:
        most = self._max_length
        if len(prompt) + len(response) <= most:
            return EncodedExample(prompt, response)
        response = response[: max(most // 2, most - len(prompt))]
        room = most - len(response)
        if len(prompt) > room:
            tail = min(HEADER_TOKENS, room - 1)
            prompt = prompt[: room - tail] + prompt[len(prompt) - tail :]
        return EncodedExample(prompt, response)


def _shared_instruction(rows: Sequence[Example]) -> str:
    """The instruction of all rows, or "" where they have none in common."""
    instructions = {row.instruction for row in rows}
    return instructions.pop() if len(instructions) == 1 else ""


def _leading_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before a text.

    Those it puts after a text would end the prompt and are dropped.
    """
    bare, framed = (
        list(tokenizer(["a"], add_special_tokens=special)["input_ids"][0])
        for special in (False, True)
    )
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return tuple(framed[:start])
    raise DataError(
        f"tokenizer {tokenizer.name_or_path!r} encodes a text otherwise when it adds "
        "special tokens than when it does not; use another one"
    )
