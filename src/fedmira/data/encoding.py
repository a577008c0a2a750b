"""Turns a client's rows into token ids.

Prompt and response apart, cut to a length, with everything that was cut counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from functools import cached_property

from fedmira.data.advantages import unlike_copies
from fedmira.data.answers import answer_text
from fedmira.data.encoded import ClientData, EncodedExample, EncodedTurn, without_middle
from fedmira.data.examples import Example, turns_of
from fedmira.data.partition import ClientRows
from fedmira.data.problems import Problems
from fedmira.data.prompts import PROMPTS
from fedmira.data.rendering import ChatTemplate, Rendering
from fedmira.data.split import Split
from fedmira.data.token_cache import TokenCache
from fedmira.data.tokenizer import Tokenizer
from fedmira.errors import DataError

__all__ = ["ROWS_AT_ONCE", "Encoder"]

ROWS_AT_ONCE = 2048
"""Rows that the tokenizer takes in one call, as its memory grows with them."""
_WORD = "Zqx"
_SAID_OTHERWISE = (
    "answers are another text once they are tokens; they are scored by the text of their tokens"
)
_UNENDED = "answers end without a token that ends a turn, so that nothing learns to stop there"
_UNMARKED = (
    "answers stand outside of what the chat template marks as written by the assistant "
    "({% generation %}); all that stands behind the prompt is learned"
)
_UNLIKE = "rows are copies of a row of another advantage, and only the first of them counts"
_JOINED = (
    "answers begin with what joins the end of the prompt, so that training and `generate` part "
    "them at another token"
)


class Encoder:
    """A tokenizer, a prompt template and a length.

    Args:
        tokenizer: any Hugging Face tokenizer.
        prompt: a key of `PROMPTS`.
        max_length: most tokens of a row, prompt and response together.
        train_on: "all" assistant turns of a conversation, or the "last".
        system, clock: as `ChatTemplate` has them.

    Attributes:
        longest_row: tokens of the longest row that was encoded so far, before it was cut.

    Raises:
        DataError: the tokenizer has no end-of-sequence token, or no chat template where one is
            asked for.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str,
        max_length: int,
        *,
        train_on: str = "all",
        system: str = "merge",
        clock: str = "",
    ) -> None:
        name = tokenizer.name_or_path
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"tokenizer {name!r} has no end-of-sequence token, so a response would "
                "never end; set its eos_token"
            )
        self._tokenizer = tokenizer
        self._form = PROMPTS[prompt]
        self._max_length = max_length
        self._train_on = train_on
        self.longest_row = 0
        self._cache = TokenCache(tokenizer)
        self._ids: dict[int, int] = {}
        self._texts: dict[tuple[int, ...], str] = {}
        self._end: int = tokenizer.eos_token_id
        self._chat = ChatTemplate(tokenizer, system, clock) if prompt == "chat" else None
        # A chat template writes the special tokens itself.
        self._start: tuple[int, ...] = () if self._chat else _leading_tokens(tokenizer)
        turn_end = self._chat.turn_end if self._chat else None
        self._ends = {self._end} if turn_end is None else {self._end, turn_end}
        self._adds_end = turn_end is None

    @property
    def template(self) -> ChatTemplate | None:
        """The chat template, where the prompt form is chat."""
        return self._chat

    @property
    def leading(self) -> tuple[int, ...]:
        """Special tokens that stand in front of every prompt and are not written by a template."""
        return self._start

    def prompt(self, example: Example) -> tuple[int, ...]:
        """The prompt's tokens at full length, for generation.

        Raises:
            DataError: the chat template refuses the messages.
        """
        if self._chat is None:
            text = self._form(example, self._tokenizer)
            return (*self._start, *self._tokens([text])[0])
        turn = _with_answer(example)
        ((prompt, _, _),) = self._spans(self._chat, [turn], [self._chat.render(turn)])
        return prompt

    def encode(
        self, rows: Sequence[Example], problems: Problems
    ) -> tuple[tuple[EncodedExample, ...], int, int]:
        """Encodes rows and counts those whose prompt and whose response was cut.

        A row longer than `max_length` keeps max_length // 2 tokens of its response, or more where
        the prompt leaves room, without the end-of-sequence token; then the prompt loses tokens from
        its middle and keeps its head and its last `HEADER_TOKENS`. Rows with a problem are noted
        and left out.

        Args:
            rows: the rows, in order.
            problems: collects what is wrong, with its place.
        """
        turns = self.turns(rows, problems)
        return (
            tuple(turn.row for turn in turns),
            sum(turn.prompt_cut for turn in turns),
            sum(turn.response_cut for turn in turns),
        )

    def turns(self, rows: Sequence[Example], problems: Problems) -> list[EncodedTurn]:
        """Encodes rows, one for each assistant turn that is learned.

        Args:
            rows: the rows, in order.
            problems: collects what is wrong, with its place.
        """
        turns = [(row, turn, turn is row) for row in rows for turn in turns_of(row, self._train_on)]
        # A batch bounds the memory that the tokenizer takes for one call.
        return [
            encoded
            for start in range(0, len(turns), ROWS_AT_ONCE)
            for encoded in self._batch(turns[start : start + ROWS_AT_ONCE], problems)
        ]

    def encode_client(
        self, client: ClientRows, split: Split, parts: Sequence[Sequence[EncodedTurn]]
    ) -> ClientData:
        """A client of its training, validation and test turns.

        Args:
            client: the rows of one client.
            split: its rows in their parts.
            parts: its encoded turns for training, validation and test, in this order.
        """
        (train, validation, test), duplicates, overlaps = _apart(parts, client.test is not None)
        turns = [*train, *validation, *test]
        notes = Counter(note for turn in turns for note in turn.notes)
        given = (*client.examples, *(client.validation or ()))
        notes[_UNLIKE] += unlike_copies((row, row.advantage) for row in given)
        notes[_UNLIKE] += unlike_copies((turn.row, turn.row.advantage) for turn in parts[0])
        return ClientData(
            client_id=client.client_id,
            task=client.task,
            category=client.category,
            train=tuple(turn.row for turn in train),
            validation=tuple(turn.row for turn in validation),
            test=tuple(turn.row for turn in test),
            references=tuple(turn.reference for turn in test),
            instruction=_shared([row.instruction for row in split.train]),
            truncated_prompts=sum(turn.prompt_cut for turn in turns),
            truncated_responses=sum(turn.response_cut for turn in turns),
            duplicates=split.duplicates + duplicates,
            overlaps=split.overlaps + overlaps,
            system=_shared([_system(row) for row in split.train]),
            tools=_shared([row.tools for row in split.train]),
            conversation=all(row.messages for row in split.train),
            notes=tuple((+notes).items()),
        )

    def _batch(
        self, turns: Sequence[tuple[Example, Example, bool]], problems: Problems
    ) -> list[EncodedTurn]:
        found = []
        for (source, turn, last), prompt, response, notes in self._whole(turns, problems):
            if not response or not prompt:
                problems.add(
                    f"{turn.where or repr(turn.instruction[:40])}: "
                    f"{'prompt' if response else 'response'} encodes to no token"
                )
                continue
            length = len(prompt) + len(response)
            self.longest_row = max(self.longest_row, length)
            row = self._fitted(prompt, response, turn.advantage)
            reference, said = self._reference(turn, response)
            found.append(
                EncodedTurn(
                    source=source,
                    last=last,
                    row=row,
                    reading=self._reading(prompt, row),
                    reference=reference,
                    prompt_cut=len(row.prompt) < len(prompt),
                    response_cut=len(row.response) < len(response),
                    length=length,
                    notes=(*notes, *said),
                )
            )
        return found

    def _whole(
        self, turns: Sequence[tuple[Example, Example, bool]], problems: Problems
    ) -> list[
        tuple[tuple[Example, Example, bool], tuple[int, ...], tuple[int, ...], tuple[str, ...]]
    ]:
        """Prompt and response of each turn at full length, and what is to be said of it."""
        if self._chat is None:
            prompts = self._tokens([self._form(turn, self._tokenizer) for _, turn, _ in turns])
            responses = self._tokens([turn.output for _, turn, _ in turns])
            return [
                (turn, (*self._start, *prompt), (*response, self._end) if response else (), ())
                for turn, prompt, response in zip(turns, prompts, responses, strict=True)
            ]
        kept, renderings = [], []
        for each in turns:
            try:
                renderings.append(self._chat.render(each[1]))
                kept.append(each)
            except DataError as error:
                problems.add(str(error))
        spans = self._spans(self._chat, [turn for _, turn, _ in kept], renderings)
        return [
            (each, prompt, response, (*rendering.notes, *notes))
            for each, rendering, (prompt, response, notes) in zip(
                kept, renderings, spans, strict=True
            )
        ]

    def _spans(
        self,
        chat: ChatTemplate,
        turns: Sequence[Example],
        renderings: Sequence[Rendering],
    ) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]]:
        """Prompt and response of each rendered turn, and what is to be said of it."""
        found: list[tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]] = []
        prompts = self._tokens([rendering.prompt for rendering in renderings])
        if chat.masked:
            return [
                self._marked(chat, turn, prompt)
                for turn, prompt in zip(turns, prompts, strict=True)
            ]
        wholes = self._tokens([rendering.whole for rendering in renderings])
        for prompt, whole in zip(prompts, wholes, strict=True):
            place = _common(prompt, whole)  # a token may join prompt and answer
            found.append((whole[:place], *self._ended(whole[place:])))
            if len(prompt) - place != self._usually_joined:
                found[-1] = (*found[-1][:2], (*found[-1][2], _JOINED))
        return found

    def _ended(self, response: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """A response with its end, and what is to be said of it."""
        if self._adds_end and response:
            return (*response, self._end), (
                "answers end with the end-of-sequence token, as the chat template writes no "
                "token behind them",
            )
        return response, () if any(token in self._ends for token in response) else (_UNENDED,)

    @cached_property
    def _usually_joined(self) -> int:
        """How many of a prompt's last tokens are others once a word follows it."""
        assert self._chat is not None, "the form is chat"
        rendering = self._chat.render(Example("a", "", _WORD))
        prompt, whole = self._tokens([rendering.prompt, rendering.whole])
        return len(prompt) - _common(prompt, whole)

    def _marked(
        self, chat: ChatTemplate, turn: Example, prompt: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]:
        """Prompt and response of a turn by the template's own marks, and what is to be said."""
        ids, mask = chat.marked(turn)
        place = _common(prompt, ids)
        # The marks may leave out tokens within an answer, those of a character of several.
        start = next((i for i in range(place, len(mask)) if mask[i]), place)
        while start and mask[start - 1] and mask[start]:
            start -= 1
        stop = next((i + 1 for i in reversed(range(start, len(mask))) if mask[i]), start)
        while stop < len(ids) and self._tokenizer.decode(ids[start:stop]).endswith("\ufffd"):
            stop += 1
        text = self._tokenizer.decode(ids[start:stop])
        if turn.output.strip() and not any(
            part in text for part in (turn.output.strip(), *turn.output.split()[-1:])
        ):
            return tuple(ids[:place]), tuple(ids[place:]), (_UNMARKED,)
        response = tuple(ids[start:stop])
        ended = any(token in self._ends for token in response)
        return tuple(ids[:start]), response, () if ended else (_UNENDED,)

    def _reference(self, turn: Example, response: tuple[int, ...]) -> tuple[str, tuple[str, ...]]:
        text = self._texts.get(response)
        if text is None:
            text = self._texts[response] = answer_text(self._tokenizer, response, self._ends)
        called = not turn.output.strip() and any(turn.extras[-1:])
        if text == turn.output.strip() or called:
            return turn.output, ()
        return text, (_SAID_OTHERWISE,)

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

    def _fitted(
        self, prompt: tuple[int, ...], response: tuple[int, ...], advantage: float | None
    ) -> EncodedExample:
        most = self._max_length
        if len(prompt) + len(response) > most:
            response = response[: max(most // 2, most - len(prompt))]
            prompt = without_middle(prompt, most - len(response))
        return EncodedExample(prompt, response, advantage)

    def _reading(self, prompt: tuple[int, ...], row: EncodedExample) -> Hashable:
        """The prompt, or where it was cut, what is left of it beside the longest response."""
        if len(row.prompt) == len(prompt):
            return prompt
        return ("cut", without_middle(prompt, self._max_length - self._max_length // 2))


def _apart(
    parts: Sequence[Sequence[EncodedTurn]], set_aside: bool
) -> tuple[list[list[EncodedTurn]], int, int]:
    """Parts without copies and without turns whose prompt stands in another part.

    Whole rows are apart already; what is dropped are earlier turns of conversations.

    Args:
        parts: training, validation and test turns.
        set_aside: whether the source set test rows aside, which then stay as they are.

    Returns:
        The parts, the copies that were dropped, and the turns that stood on two sides.
    """
    unique = [list({turn.row: turn for turn in reversed(part)}.values())[::-1] for part in parts]
    copies = sum(len(part) for part in parts) - sum(len(part) for part in unique)
    before = sum(len(part) for part in unique)
    seen: set[Hashable] = set()
    for place in (2, 1, 0) if set_aside else (0, 1, 2):
        unique[place] = [turn for turn in unique[place] if turn.reading not in seen]
        seen |= {turn.reading for turn in unique[place]}
    return unique, copies, before - sum(len(part) for part in unique)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _with_answer(example: Example) -> Example:
    return Example(
        example.instruction,
        example.input,
        _WORD,
        messages=example.messages,
        extras=example.extras and (*example.extras[: len(example.messages)], ""),
        tools=example.tools,
    )


def _system(row: Example) -> str:
    return row.messages[0][1] if row.messages and row.messages[0][0] == "system" else ""


def _shared(texts: Sequence[str]) -> str:
    """The one text that all are, or "" where they differ."""
    distinct = set(texts)
    return distinct.pop() if len(distinct) == 1 else ""


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
