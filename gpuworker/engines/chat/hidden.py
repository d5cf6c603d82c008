"""Takes out of a reply what a model thinks, as far as the model writes it among its words. Pure."""

import re

#: What a model puts around its thoughts, if its server leaves them in.
_TAGS = {"<think>": "</think>", "<thinking>": "</thinking>", "[THINK]": "[/THINK]"}
_ANY = re.compile("|".join(map(re.escape, (*_TAGS, *_TAGS.values()))), re.IGNORECASE)
_CLOSING = {opening.lower(): re.compile(re.escape(closing), re.IGNORECASE) for opening, closing in _TAGS.items()}
#: What may become a tag when more comes.
_BEGUN = frozenset(tag[:end].lower() for tag in (*_TAGS, *_TAGS.values()) for end in range(1, len(tag)))
_LONGEST = max(map(len, _BEGUN))


class ShownText:
    """A reply that grows, without its thoughts and without the space before its first word.

    Args:
        thinks_first: it begins within thoughts, whose beginning the model was given.
    """

    def __init__(self, *, thinks_first: bool = False) -> None:
        #: Finds the end of the thoughts that have begun; None outside of any.
        self._closing = _CLOSING["<think>"] if thinks_first else None
        #: The end of the text so far, as far as it may be the beginning of a tag.
        self._held = ""
        self._begun = False
        self.has_thought = thinks_first

    def add(self, text: str) -> str:
        """Append to the reply; returns what can be shown now."""
        text, self._held = self._held + text, ""
        shown = []
        at = 0
        while found := (self._closing or _ANY).search(text, at):
            if self._closing is None:
                shown.append(text[at : found.start()])
                self._closing = _CLOSING.get(found[0].lower())  # None after a closing tag that closes nothing
                self.has_thought = True
            else:
                self._closing = None
            at = found.end()
        held = next((size for size in range(_LONGEST, 0, -1) if text[at:][-size:].lower() in _BEGUN), 0)
        end = len(text) - min(held, len(text) - at)
        self._held = text[end:]
        if self._closing is None:
            shown.append(text[at:end])
        return self._without_margin("".join(shown))

    def finish(self) -> str:
        """The rest that can be shown; the reply has ended."""
        return "" if self._closing is not None else self._without_margin(self._held)

    def _without_margin(self, text: str) -> str:
        text = text if self._begun else text.lstrip()
        self._begun = self._begun or bool(text)
        return text
