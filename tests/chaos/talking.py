"""The clients that talk: each holds one conversation after another over HTTP, and judges its history."""

import base64
import json
import random
from collections.abc import Sequence
from typing import Any

import attrs
import trio

from tests.chaos.asking import BROKEN, LATER, WAV_HEADER_BYTES, Pieces, WebPeer
from tests.chaos.clients import AGAIN_S, END_S
from tests.chaos.talk_plans import SESSION, Saying, draw_sayings
from tests.chaos.talk_verdict import ENDED, Memory, Said, Turn, judge_talk, reply_to
from tests.support.raw_http_client import events_of
from tests.support.timed_http_client import Answer

#: Time between two looks at the turns.
LOOK_S = 0.3
#: Silence after which an answer that comes with the end of the reply is given up.
WHOLE_SILENCE_S = 15.0
#: How long after its line was cut a question may still arrive at the relay.
LATE_S = 60.0
#: Tries to get a reply as one answer.
MOST_WHOLE = 2
SSE = ("Accept", "text/event-stream")


@attrs.define(eq=False)
class Conversation:
    """One conversation, as its client knows it."""

    name: str
    talk_id: str = ""
    said: list[Said] = attrs.field(factory=list)
    memory: Memory = attrs.field(factory=Memory)
    #: When its replies were seen to have ended.
    ended_at: dict[str, float] = attrs.field(factory=dict)


@attrs.define(eq=False)
class Talker(WebPeer):
    """One program that talks, with its line.

    Args:
        user: with which of its principal's users it talks. Another talker, of another principal, has the same.
    """

    user: str = ""
    others: Sequence["Talker"] = ()
    talk: Conversation = attrs.field(factory=lambda: Conversation("none"))
    #: Texts of earlier conversations that may come late; and until when an interruption may.
    _stale: set[str] = attrs.field(factory=set)
    _interrupts_until: float = 0.0
    _plans: random.Random = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._plans = random.Random(f"{self.seed} plans of {self.name}")

    async def serve(self, calm: trio.Event) -> None:
        """Hold one conversation after another until `calm` is set."""
        number = 0
        while not calm.is_set():
            number += 1
            await self.converse(f"{self.name} #{number}")

    async def converse(self, name: str, sayings: Sequence[Saying] = ()) -> None:
        """Hold one conversation, judge its history, and delete it."""
        self.talk = Conversation(name)
        sayings = sayings or draw_sayings(self._plans, name)
        with trio.move_on_after(END_S) as patience:
            await self._begin()
            async with trio.open_nursery() as listening:
                for saying in sayings:
                    await self._say(saying, listening)
                    await self._pry()
                    patience.deadline = trio.current_time() + END_S
            await self._judge(await self._settled())
            await self._delete()
        if patience.cancelled_caught:
            self._complain(f"no end within {END_S:g} s")
            with trio.move_on_after(END_S):
                await self._delete()  # or the next conversation would have its turns
        self.counts["conversations"] += 1
        self._stale |= {each.saying.text for each in self.talk.said if not each.acknowledged}

    def _complain(self, what: str) -> None:
        self.ledger.complain(f"{self.talk.name} ({self.talk.talk_id}): {what}")

    def _note(self, what: str) -> None:
        self.ledger.note(self.talk.name, what)

    # -- asking

    async def _ask_talk(self, method: str, rest: str = "", **told: Any) -> tuple[int, Any]:
        """Ask about the conversation until there is an answer: its status, and what it says."""
        path = f"/v1/talks/{SESSION}{rest}?user={self.user}"
        more = {"body": json.dumps(told | {"user": self.user}).encode()} if method == "POST" else {}
        answer, body = await self.until_answered(self.talk.name, method, path, **more)
        return answer.status, json.loads(body) if body else None

    async def _begin(self) -> None:
        told = json.dumps({"session": SESSION, "user": self.user}).encode()
        answer, body = await self.until_answered(self.talk.name, "POST", "/v1/talks", body=told)
        if answer.status not in (200, 201):
            self._complain(f"it was not begun: {answer.status} {body[:300]!r}")
            return
        self.ledger.note_answer()
        self.talk.talk_id = json.loads(body)["id"]
        self._note(f"begins {self.talk.talk_id} with user {self.user}")

    async def _turns(self) -> list[Turn]:
        status, told = await self._ask_talk("GET", "/turns")
        if status != 200:
            return []
        turns: list[Turn] = told["turns"]
        self.talk.memory.see(turns)
        now = trio.current_time()
        for each in self.talk.said:
            reply = reply_to(turns, each.saying.text)
            if reply is not None and reply["state"] in ENDED and each.saying.text not in self.talk.ended_at:
                self.talk.ended_at[each.saying.text] = now
                each.restarted = self._was_restarted(each.said_at, now)
        return turns

    def _was_restarted(self, since: float, until: float) -> bool:
        return any(
            fault.target == "relay" and fault.kind != "SIGSTOP" and fault.began_at <= until and fault.healed_at >= since
            for fault in self.ledger.faults
        )

    async def _settled(self) -> list[Turn]:
        """The turns, after all replies have ended."""
        while True:
            turns = await self._turns()
            if all(turn["state"] in ENDED for turn in turns):
                return turns
            await trio.sleep(LOOK_S)

    async def _until_ended(self, said: Said) -> None:
        """Wait until the reply has ended; or until it is not there, which the verdict tells."""
        while True:
            reply = reply_to(await self._turns(), said.saying.text)
            if reply is None or reply["state"] in ENDED:
                return
            await trio.sleep(LOOK_S)

    # -- saying something

    async def _say(self, saying: Saying, listening: trio.Nursery) -> None:
        """Say something until it is acknowledged, each time in other words, and do what its deed says."""
        over, enough = trio.Event(), trio.Event()
        number = 0
        while not (said := await self._say_once(saying, number, (enough, over), listening)).acknowledged:
            number, over, enough = number + 1, trio.Event(), trio.Event()
            await trio.sleep(AGAIN_S)
        if saying.deed == "go on":
            return
        if saying.deed == "interrupt":
            await enough.wait()
            await self._interrupt(said)
        elif saying.deed == "follow":
            await over.wait()
        await self._until_ended(said)

    async def _say_once(
        self, saying: Saying, number: int, events: tuple[trio.Event, trio.Event], listening: trio.Nursery
    ) -> Said:
        """Try to say something; `events` are set when enough of the reply was heard, and at its end."""
        if number:
            # An answer that comes with the end may never come while the relay is killed so often.
            deed = "follow" if saying.deed == "whole" and number > MOST_WHOLE else saying.deed
            saying = attrs.evolve(saying, text=f"{saying.text} ({number})", deed=deed)
        said = Said(saying, trio.current_time())
        said.may_be_interrupted = said.said_at < self._interrupts_until
        self.talk.said.append(said)
        if saying.interrupt:
            self._begin_interruption()
        await listening.start(self._listen, said, *events)
        if saying.interrupt:
            self._end_interruption(answered=said.acknowledged)
        return said

    async def _listen(
        self,
        said: Said,
        enough: trio.Event,
        over: trio.Event,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Say it, tell whether it is acknowledged, and listen to the reply."""
        is_whole = said.saying.deed == "whole"
        path = f"/v1/talks/{SESSION}/say?user={self.user}"
        headers = [] if is_whole else [SSE]
        more = {"silence_s": WHOLE_SILENCE_S} if is_whole else {}
        try:
            async with self.ask("POST", path, body=said.saying.body, headers=headers, **more) as answer:
                if answer.status != 200:
                    self._take_refusal(said, answer.status, await answer.body())
                elif is_whole:
                    with trio.fail_after(WHOLE_SILENCE_S):
                        self._take_whole(said, await answer.json())
                else:
                    said.acknowledged = True
                    self._note(f"said {said.saying.text!r}: {said.saying.deed}")
                    self.ledger.note_answer()
                    task_status.started()
                    await self._take_events(said, answer, enough)
        except BROKEN as fault:
            self.broken(self.talk.name, fault)
        finally:
            enough.set()
            over.set()
            if is_whole or not said.acknowledged:
                task_status.started()

    def _take_refusal(self, said: Said, status: int, body: bytes) -> None:
        self.counts[f"texts answered {status}"] += 1
        is_failure = said.saying.deed == "whole" and b'"code"' in body  # of the reply, which the turns tell
        if status not in LATER and not is_failure:
            self._complain(f"{said.saying.text!r} was refused: {status} {body[:300]!r}")

    def _take_whole(self, said: Said, told: Any) -> None:
        said.acknowledged = True
        self.ledger.note_answer()
        said.told, said.text = told["turn"], told["text"]
        if told["audio"] is not None:
            said.pcm = base64.b64decode(told["audio"]["data"])[WAV_HEADER_BYTES:]
        said.spoken_whole = told["turn"]["state"] == "done" and bool(told["speech"]) and told["speech"]["code"] is None

    async def _take_events(self, said: Said, answer: Answer, enough: trio.Event) -> None:
        left, number = b"", 0
        async for piece in Pieces(answer):
            whole, mark, left = (left + piece).rpartition(b"\n\n")
            for kind, _id, data in events_of(whole + mark):
                number += 1
                self._take_event(said, kind, data)
            if number >= said.saying.at_event:
                enough.set()
                if said.saying.deed == "leave":
                    self.counts["replies left in the middle"] += said.told is None
                    return
        if said.told is None and said.failure is None:
            self.broken(self.talk.name, EOFError("the events ended without an end"))

    def _take_event(self, said: Said, kind: str, data: Any) -> None:
        match kind:
            case "text":
                said.text += data["text"]
            case "speech":
                said.pcm += base64.b64decode(data["pcm"])
            case "speech_ended":
                said.spoken_whole = data["code"] is None
            case "ended":
                said.told = data
                said.spoken_whole = said.spoken_whole and data["state"] == "done"
                self.ledger.note_answer()
            case "failed":
                said.failure = data["code"]
            case "error" if data["code"] != "shutting_down":
                self._complain(f"the events of {said.saying.text!r} ended with {data}")

    # -- interrupting

    def _begin_interruption(self) -> None:
        self._interrupts_until = float("inf")
        for each in self.talk.said:
            if each.saying.text not in self.talk.ended_at:
                each.may_be_interrupted = True

    def _end_interruption(self, *, answered: bool) -> None:
        """After an answer, no more comes; otherwise it may come late."""
        self._interrupts_until = trio.current_time() + (0 if answered else LATE_S)

    async def _interrupt(self, said: Said) -> None:
        """Interrupt its reply; mostly say before how much of it was heard."""
        played = self._plans.randrange(len(said.pcm) // 2 + 1)
        reply = reply_to(await self._turns(), said.saying.text)
        if said.saying.tells_heard and said.saying.speak and said.pcm and reply is not None:
            status, _ = await self._ask_talk("POST", "/heard", number=reply["number"], samples=played)
            said.heard = played if status == 204 else None
            self._note(f"has heard {played} samples of turn {reply['number']}: {status}")
        # Also one that was not acknowledged may be there, and be the one that is interrupted.
        unended = [each for each in self.talk.said if each.saying.text not in self.talk.ended_at]
        was_cut = self.counts["HTTP responses cut"]
        self._begin_interruption()
        status, told = await self._ask_talk("POST", "/interrupt")
        self._end_interruption(answered=self.counts["HTTP responses cut"] == was_cut)
        self.ledger.note_answer()
        self.counts["interruptions"] += 1
        if status != 200:
            self._complain(f"an interruption was answered with {status} {told}")
        elif told["interrupted"] and unended == [said]:
            said.was_interrupted = True
        self._note(f"interrupts: {told}")

    # -- the verdict

    async def _pry(self) -> None:
        """Look into the conversation of another principal, by its id."""
        strangers = [each for each in self.others if each.token != self.token and each.talk.talk_id]
        if strangers and self._plans.random() < 0.2:
            path = f"/v1/talks/{self._plans.choice(strangers).talk.talk_id}/turns?user={self.user}"
            answer, body = await self.until_answered(self.talk.name, "GET", path)
            self.counts["conversations pried into"] += 1
            if answer.status != 404:
                self._complain(f"it was told of another principal's: {answer.status} {body[:300]!r}")

    async def _judge(self, turns: list[Turn]) -> None:
        for fault in judge_talk(self.talk.said, turns, self.talk.memory, self._stale):
            self._complain(fault)
        for turn in turns:
            if turn["role"] == "assistant":
                self.counts[f"replies {turn['state']}" + (f", {turn['code']}" if turn["code"] else "")] += 1
        self.counts["turns judged"] += len(turns)
        self.counts["texts acknowledged"] += sum(each.acknowledged for each in self.talk.said)
        for each in self.talk.said:
            reply = reply_to(turns, each.saying.text)
            if reply is not None and reply["state"] == "done" and reply["code"] is None and each.saying.speak:
                await self._check_speech(each, reply)

    async def _check_speech(self, said: Said, reply: Turn) -> None:
        path = f"/v1/requests/{reply['speech_request']}/audio?format=pcm"
        answer, body = await self.until_answered(self.talk.name, "GET", path)
        if answer.status == 404 and trio.current_time() - said.said_at >= self.ledger.windows.retain_s * 0.9:
            self.counts["speeches that were kept no longer"] += 1
            return
        expected = said.saying.speech(reply["content"])
        if answer.status != 200 or body != expected:
            told = body[:300] if answer.status != 200 else f"{len(body)} bytes of {len(expected)}"
            self._complain(f"reply {reply['number']} is done, and its speech is {answer.status} {told!r}")
        self.counts["samples of replies compared"] += len(body) // 2

    async def _delete(self) -> None:
        status, _ = await self._ask_talk("DELETE")
        if status not in (204, 404):
            self._complain(f"DELETE was answered with {status}")
        self.ledger.note_answer()
        told = {each.saying.text for each in self.talk.said if each.acknowledged}
        if left := [turn["content"] for turn in await self._turns() if turn["content"] in told]:
            self._complain(f"it was deleted, and still has {left}")
