"""The rules of a verdict on a conversation: what its history must be, given what was said and heard. Pure functions."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import attrs

from gpuworker.speaking.live_text import pieces_of
from tests.chaos.talk_plans import Saying, retort

Turn = Mapping[str, Any]
ENDED = ("done", "interrupted", "failed")
#: How a reply may fail, or its speech, though nothing is wrong: no worker came for it in time, or an operator paused.
EXCUSED = ("no_worker", "queue_timeout", "space_paused")
#: Of a conversation, how many combinations of what was heard at different times are looked at.
MAX_PROMPTS = 4_096


@attrs.define(eq=False)
class Said:
    """One try to say something, and all that was heard of it.

    Args:
        saying: its text is that of this try alone.
        said_at: when it was sent.
    """

    saying: Saying
    said_at: float
    #: Whether the answer promised that it is stored.
    acknowledged: bool = False
    #: Of the reply, as it was told: its text and samples so far, and the turn, once it was told as ended.
    text: str = ""
    pcm: bytes = b""
    told: Turn | None = None
    failure: str | None = None
    #: Whether the speech was told as whole.
    spoken_whole: bool = False
    #: Samples that the relay was told to have been played.
    heard: int | None = None
    #: Whether an interruption may have met its reply; and whether one was answered that can have met no other.
    may_be_interrupted: bool = False
    was_interrupted: bool = False
    #: Whether the relay was restarted while the reply was made.
    restarted: bool = False


@attrs.define(eq=False)
class Memory:
    """What was seen of a history: by number, what was heard of each turn, as it was told at different times."""

    contents: dict[int, set[str]] = attrs.field(factory=lambda: defaultdict(set))

    def see(self, turns: Sequence[Turn]) -> None:
        """Note the turns that have ended."""
        for turn in turns:
            if turn["state"] in ENDED:
                self.contents[turn["number"]].add(heard_of(turn))


def heard_of(turn: Turn) -> str:
    """What was heard of a turn."""
    content: str = turn["content"][: turn["heard_chars"]]
    return content.strip()


def reply_to(turns: Sequence[Turn], text: str) -> Turn | None:
    """The turn behind the one that says `text`."""
    at = next((at for at, turn in enumerate(turns) if turn["role"] == "user" and turn["content"] == text), None)
    return turns[at + 1] if at is not None and at + 1 < len(turns) else None


def judge_talk(said: Sequence[Said], turns: Sequence[Turn], memory: Memory, stale: Collection[str]) -> list[str]:
    """What is wrong with a history; empty if the promises were kept.

    Args:
        said: what was said, in order.
        turns: the history, after every reply has ended.
        memory: what was seen of it before.
        stale: texts of earlier conversations that may arrive late, because no answer to them arrived.
    """
    memory.see(turns)
    by_text = {each.saying.text: each for each in said}
    numbers = [turn["number"] for turn in turns]
    complaints = [] if numbers == sorted(set(numbers)) else [f"the turns have the numbers {numbers}"]
    texts = [turn["content"] for turn in turns if turn["role"] == "user"]
    complaints += [f"it has a text of another: {text!r}" for text in texts if text not in by_text and text not in stale]
    complaints += [f"it has {text!r} {times} times" for text, times in Counter(texts).items() if times > 1]
    acknowledged = [each.saying.text for each in said if each.acknowledged]
    complaints += [f"it has lost {text!r}, which was acknowledged" for text in acknowledged if text not in texts]
    in_order = [text for text in texts if text in acknowledged]
    if not complaints and in_order != acknowledged:
        complaints.append(f"it is out of order: {in_order}")
    for at, turn in enumerate(turns):
        if turn["role"] == "user":
            reply = reply_to(turns, turn["content"])
            if reply is None or reply["role"] != "assistant":
                complaints.append(f"turn {turn['number']} has no reply")
            continue
        before = turns[at - 1]
        if at and before["role"] == "user" and before["content"] in by_text:
            for fault in _judge_reply(by_text[before["content"]], turn, turns[:at], memory):
                complaints.append(f"reply {turn['number']} ({by_text[before['content']].saying.deed}): {fault}")
        elif not (at and before["content"] in stale):
            complaints.append(f"turn {turn['number']} replies to nothing")
    return complaints


def _judge_reply(said: Said, turn: Turn, before: Sequence[Turn], memory: Memory) -> Iterator[str]:
    state, code, content = turn["state"], turn["code"], turn["content"]
    replies = [retort(messages) for messages in prompts(before, memory)]
    expected = next((reply for reply in replies if reply.startswith(content)), None)
    if expected is None:
        yield f"{content!r} is not the reply to what was said and heard, which is {replies[0]!r}"
        return
    if state == "done" and content != expected:
        yield f"it is told as done with {len(content)} of {len(expected)} characters"
    if code is not None and code not in EXCUSED:
        yield f"it is {state}, with {code}: {turn['message']}"
    if state not in ENDED or (state == "failed" and code is None):
        yield f"it is {state}, without a reason"
    if state == "interrupted" and not said.may_be_interrupted:
        yield "it is interrupted, which nobody has asked for"
    if state == "done" and said.was_interrupted:
        yield "it is done, though the answer said that it was interrupted"
    if said.heard is not None and not said.restarted:
        heard = len(content) if turn["heard_chars"] is None else turn["heard_chars"]
        most = _most_heard(said.saying, expected, said.heard)
        if heard > most:
            yield f"it has {heard} characters as heard, of which {most} were played at most"
    yield from _judge_told(said, turn, expected)


def _judge_told(said: Said, turn: Turn, expected: str) -> Iterator[str]:
    """What is wrong with what its listener was told."""
    told = said.told
    if told is not None and any(told[key] != turn[key] for key in ("number", "state", "content", "code")):
        yield f"it was told as {dict(told)}, and is {dict(turn)}"
    if not expected.startswith(said.text):
        yield f"its listener was told {said.text!r}"
    if turn["state"] == "done" and told is not None and said.text != expected:
        yield f"its listener was told {len(said.text)} characters of it"
    if said.failure is not None and turn["state"] != "failed":
        yield f"its listener was told that it has failed with {said.failure}, and it is {turn['state']}"
    samples = said.saying.speech(expected) if said.saying.speak else b""
    if not samples.startswith(said.pcm) or (said.spoken_whole and samples != said.pcm):
        yield f"its listener was told {len(said.pcm)} bytes of speech that are not the {len(samples)} expected"


def _most_heard(saying: Saying, reply: str, samples: int) -> int:
    """The characters of a reply up to the end of the piece that was spoken last."""
    pieces = list(pieces_of([reply]))
    at = samples // saying.piece_samples
    return pieces[at].text_end if at < len(pieces) else len(reply)


def prompts(turns: Sequence[Turn], memory: Memory) -> list[list[dict[str, str]]]:
    """What the model may have been told: one prompt for each combination of what was heard at different times."""
    heard = [sorted(memory.contents[turn["number"]] or {heard_of(turn)}) for turn in turns]
    found = []
    for contents in itertools.islice(itertools.product(*heard), MAX_PROMPTS):
        messages: list[dict[str, str]] = []
        for turn, content in zip(turns, contents, strict=True):
            if content and messages and messages[-1]["role"] == turn["role"]:
                messages[-1]["content"] += f"\n\n{content}"
            elif content and (messages or turn["role"] == "user"):
                messages.append({"role": turn["role"], "content": content})
        found.append(messages)
    return found
