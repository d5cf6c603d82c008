"""Which of the relays of a list is tried next."""

from protocol.client.address import Address, parse_address


class Places:
    """The relays of a list, tried in rounds; the ones that were lost or did not answer come last.

    Args:
        address: the relays; the first is tried first.
    """

    def __init__(self, address: Address) -> None:
        self._known = list(address.each)
        #: Those to be tried in this round.
        self._left: list[Address] = []
        self._doubtful: set[Address] = set()
        self._followed: set[Address] = set()

    def begin_round(self) -> Address:
        """Try all of them once more; returns the first."""
        first, *self._left = self._known
        self._followed = set()
        return first

    def next(self) -> Address | None:
        """Return the next relay of this round; None at its end."""
        return self._left.pop(0) if self._left else None

    def doubts(self, place: Address) -> bool:
        """Whether it was lost or did not answer when it was tried last, and there are others."""
        return len(self._known) > 1 and place in self._doubtful

    def note_answer(self, place: Address) -> None:
        """It answers."""
        self._doubtful.discard(place)

    def note_loss(self, place: Address) -> None:
        """It was lost, or does not answer: the others are tried first."""
        self._doubtful.add(place)
        if place in self._known:
            self._known.remove(place)
            self._known.append(place)

    def follow(self, place: Address, url: str) -> None:
        """Try `url` next, which `place` named as the owner of its cluster, once a round.

        A link with TLS is not given up for one without: the token would be sent in plain text.
        """
        try:
            owner = parse_address(url).each[0]
        except ValueError:
            return
        if owner.kind == "unix" or (place.kind == "tls" and owner.kind != "tls"):
            return
        if owner == place or owner in self._followed or owner in self._doubtful:
            return
        self._followed.add(owner)
        self._left = [owner, *(each for each in self._left if each != owner)]
