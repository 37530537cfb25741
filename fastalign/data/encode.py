"""Checked examples to token ids, in batches, with the same ids as TRL 1.16's trainers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastalign.data.examples import Example
from fastalign.data.messages import Message, Turns, check_text, common_prefix_length
from fastalign.data.templates import TemplateTraits, has_marks, missing_marks, require_chat_template
from fastalign.data.tokenizer import require_eos
from fastalign.errors import DataError, TemplateError

Ids = list[int]

_REPEATED = "the completions begin with the whole prompt, which is trained on twice; remove it from them, or the column 'prompt'"
_USER_TURNS = "user turns inside a completion are scored like the assistant's"
_UNSTOPPED = (
    "the chat template closes {% generation %} before the token that ends the assistant's turn, so that stopping is not "
    "trained; move the tag {% endgeneration %} behind that token"
)


@dataclass(frozen=True)
class Encoded:
    """Token ids of an example, not yet cut. The sequences are `prompt + completion`, for each of the completions.

    `masks` says which tokens of each completion are scored; () is all of them.
    """

    example: Example
    prompt: Ids
    completions: list[Ids]
    masks: list[list[bool]]


class Encoder:
    """Tokenizes examples.

    Plain rows: prompt and completion are tokenized as one text, EOS appended unless the text has it. Conversational rows:
    rendered by the chat template; EOS is appended only if the template writes nothing after the assistant's turn. The
    completion starts where the ids of the prompt and of any of the sequences part, or at the first scored token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> None:
        require_eos(tokenizer)
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size or len(tokenizer)
        self.notices: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()  # text at a prompt's end that its sequences do not have
        self._eos, self._eos_id = str(tokenizer.eos_token), int(tokenizer.eos_token_id)  # type: ignore[arg-type]
        bare, special_ids = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        self._adds_eos = len(special_ids) > len(bare) and special_ids[-1] == self._eos_id
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = tuple(special | set(tokenizer.all_special_tokens))
        self._shared_ids = list(range(self.vocab_size))  # one int object per id: a stored token costs 8 bytes, not 36

    def encode(self, examples: Sequence[Example]) -> list[Encoded | DataError]:
        """One result per example, in order: its ids, or the error that names it."""
        results: dict[int, Encoded | DataError] = {}
        for conversational in (False, True):
            texts: list[str] = []
            rendered: list[tuple[int, slice]] = []
            to_texts: Callable[[Example], list[str]] = self._render if conversational else self._plain
            for i, example in enumerate(examples):
                if example.conversational != conversational:
                    continue
                try:
                    start = len(texts)
                    texts += to_texts(example)
                    rendered.append((i, slice(start, len(texts))))
                except DataError as error:
                    results[i] = error
            if not texts:
                continue
            ids = self.tokenizer(
                texts,
                add_special_tokens=not conversational,  # a chat template writes its own
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
            for i, rows in rendered:
                try:
                    results[i] = self._encoded(examples[i], texts[rows], ids[rows])
                except DataError as error:
                    results[i] = error
        return [results[i] for i in range(len(examples))]

    def all_notices(self) -> Counter[str]:
        """What the user should hear about, with the number of rows it concerns."""
        if not self.moved:
            return self.notices
        shown = ", ".join(repr(tail) for tail, _ in self.moved.most_common(3)) + (", ..." if len(self.moved) > 3 else "")
        notice = (
            f"the prompt's last tokens ({shown}) are not what comes before the completion, because of the template or of a merge "
            "across the boundary: they are left out, and the completion starts where the two part; at inference the model sees them"
        )
        return self.notices + Counter({notice: self.moved.total()})

    def _plain(self, example: Example) -> list[str]:
        """The prompt, and the sequences with their EOS."""
        prompt, completions = str(example.prompt or ""), [str(completion) for completion in example.completions]
        if len(prompt) > 15 and completions and all(completion.startswith(prompt) for completion in completions):
            self.notices[_REPEATED] += 1
        return [prompt, *(prompt + (text if text.endswith(self._eos) else text + self._eos) for text in completions)]

    def _render(self, example: Example) -> list[str]:
        """The prompt as it is before an answer, and the sequences."""
        require_chat_template(self.tokenizer, example.place)
        prompt = self._messages(example.prompt or [])
        completions = [self._messages(turns) for turns in example.completions]
        if example.scored == "completion" and any(message["role"] == "user" for turns in completions for message in turns):
            self.notices[_USER_TURNS] += 1
        texts = ["" if example.prompt is None else str(self._template(example, prompt, tokenize=False, add_generation_prompt=True))]
        texts += [str(self._template(example, prompt + turns, tokenize=False)) for turns in completions]
        for text in texts:
            check_text(f"{example.place}: the rendered messages", text)
        return texts

    def _template(self, example: Example, messages: list[Message], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, tools=example.tools, **options, **dict(example.template_kwargs))
        except Exception as error:  # a template is a program of the user's
            roles = ", ".join(message["role"] for message in messages)
            raise TemplateError(f"{example.place}: the chat template cannot render the messages ({roles}): {error}") from error

    def _messages(self, turns: Turns) -> list[Message]:
        assert not isinstance(turns, str)
        return self._traits.adapt(turns)

    @cached_property
    def _traits(self) -> TemplateTraits:
        return TemplateTraits.of(self.tokenizer)

    def _encoded(self, example: Example, texts: list[str], ids: list[Ids]) -> Encoded:
        prompt, *sequences = ids
        if not example.conversational:
            if self._adds_eos:  # the text has its EOS already, and a prompt has none
                prompt, sequences = prompt[:-1], [sequence[:-1] for sequence in sequences]
            if any(sequence[-1:] != [self._eos_id] for sequence in sequences):
                raise TemplateError(
                    f"{example.place}: the tokenizer does not read its own EOS text {self._eos!r} as one token; "
                    'mark it "special" under added_tokens in tokenizer.json'
                )
        else:
            sequences = [self._ended(text, full) for text, full in zip(texts[1:], sequences)]
        start = min((common_prefix_length(prompt, sequence) for sequence in sequences), default=len(prompt))
        if start < len(prompt):
            self._moved(example, texts, prompt, start)
        masks: list[list[bool]] = []
        if example.scored == "all":
            start = 0
        elif example.scored != "completion":
            [sequence] = sequences
            mask = self._assistant_mask(example, sequence)
            if example.scored == "assistant_in_completion":
                mask[:start] = [False] * start
            start = mask.index(True) if True in mask else len(mask)
            masks = [mask[start:]]
        share = self._shared_ids.__getitem__
        try:
            return Encoded(
                example,
                list(map(share, (sequences or [prompt])[0][:start])),
                [list(map(share, sequence[start:])) for sequence in sequences],
                masks,
            )
        except IndexError:
            worst = max(max(part, default=0) for part in ids)
            raise DataError(
                f"{example.place}: token id {worst} ({self.tokenizer.convert_ids_to_tokens(worst)!r}) is beyond the model's "
                f"{self.vocab_size} token ids; use the tokenizer that belongs to the model, or resize its embeddings"
            ) from None

    def _ended(self, text: str, ids: Ids) -> Ids:
        if ids and ids[-1] == self._eos_id:
            return ids
        turn_end = self._traits.turn_end.strip()
        if not turn_end and not text.rstrip().endswith(self._special):
            self.notices[
                f"the chat template writes nothing after the assistant's turn; EOS {self._eos!r} was appended to the completion"
            ] += 1
            return [*ids, self._eos_id]
        if turn_end and self._eos not in turn_end:
            self.notices[
                f"the chat template ends the assistant's turn with {turn_end!r}, not with EOS {self._eos!r}: "
                "generation has to stop on it (eos_token_id in generation_config.json)"
            ] += 1
        return ids

    def _assistant_mask(self, example: Example, sequence: Ids) -> list[bool]:
        """Which tokens of a conversation the template marks as the assistant's, the EOS that was appended included."""
        messages = self._messages([*(example.prompt or []), *example.completions[0]])  # type: ignore[list-item]
        if not self.tokenizer.is_fast:
            raise TemplateError(
                f"{example.place}: data.assistant_only needs a tokenizer that knows where its tokens are in the text (tokenizer.json)"
            )
        if not has_marks(self.tokenizer):
            raise TemplateError(f"{example.place}: {missing_marks(self.tokenizer)}")
        marked = self._template(example, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        mask = [bool(token) for token in marked["assistant_masks"]]
        assert list(marked["input_ids"]) == sequence[: len(mask)], "the template renders the same text again"
        if not any(mask):
            raise TemplateError(f"{example.place}: {missing_marks(self.tokenizer)}")
        last = len(mask) - 1 - mask[::-1].index(True)
        if last + 1 < len(mask) and sequence[last] not in self.tokenizer.all_special_ids and sequence[last + 1] in self._stops:
            self.notices[_UNSTOPPED] += 1
        return mask + [True] * (len(sequence) - len(mask))

    @cached_property
    def _stops(self) -> frozenset[int]:
        return frozenset({*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()})

    def _moved(self, example: Example, texts: list[str], prompt: Ids, start: int) -> None:
        """Tokens at the prompt's end that the sequences do not have: a notice, or an error if they are the user's words."""
        tail = decode(self.tokenizer, prompt[start:])
        if example.conversational:
            bare = self._template(example, self._messages(example.prompt or []), tokenize=False)
            words = texts[0][: common_prefix_length(bare, texts[0])].rstrip()
            for full in texts[1:]:
                same = common_prefix_length(texts[0], full)
                if same < len(words):
                    raise TemplateError(
                        f"{example.place}: the chat template is not prefix-stable: alone the prompt goes on with "
                        f"{_excerpt(texts[0], same)}, before the completion with {_excerpt(full, same)}; "
                        "use a template (data.chat_template) or chat_template_kwargs that render a prompt the same way in both"
                    )
        self.moved[tail] += 1


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The exact text of `ids`, special tokens included."""
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _excerpt(text: str, start: int) -> str:
    return repr(text[start : start + 40]) if start < len(text) else "nothing"
