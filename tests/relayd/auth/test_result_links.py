"""Links to results: good for one result and one grant, signed with a key that outlives the daemon."""

from pathlib import Path

import pytest

from relayd.auth.result_links import KEY_BYTES, KEY_NAME, LinkGrant, load_signer, new_signer

GRANT = LinkGrant(expires_at=1_800_000_000, token_id="tok_1")


def test_a_link_is_good_for_its_result_alone_and_says_what_it_grants() -> None:
    signer = new_signer()
    link = signer.make("a.wav", GRANT)
    assert link.startswith("1800000000.tok_1.")
    assert signer.read("a.wav", link) == GRANT
    assert signer.read("b.wav", link) is None
    assert signer.read("a.wav", link.replace("1800000000", "1900000000")) is None
    assert signer.read("a.wav", link.replace("tok_1", "tok_2")) is None
    assert signer.read("a.wav", link[:-1]) is None
    assert new_signer().read("a.wav", link) is None
    local = LinkGrant(expires_at=1, token_id="")
    assert signer.read("a.wav", signer.make("a.wav", local)) == local


def test_links_outlive_the_daemon(tmp_path: Path) -> None:
    link = load_signer(tmp_path).make("a.wav", GRANT)
    key = (tmp_path / KEY_NAME).read_bytes()
    assert len(key) == KEY_BYTES == 32
    assert load_signer(tmp_path).read("a.wav", link) == GRANT
    assert (tmp_path / KEY_NAME).read_bytes() == key
    assert (tmp_path / KEY_NAME).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("size", [0, KEY_BYTES - 1, KEY_BYTES + 1, 3 * KEY_BYTES])
def test_a_key_that_is_not_whole_is_made_anew_and_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    (tmp_path / KEY_NAME).write_bytes(b"x" * size)
    (tmp_path / KEY_NAME).chmod(0o600)
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", synced.append)
    signer = load_signer(tmp_path)
    key = (tmp_path / KEY_NAME).read_bytes()
    assert len(key) == KEY_BYTES
    assert key.strip(b"x")
    assert len(synced) == 1
    assert load_signer(tmp_path).read("a.wav", signer.make("a.wav", GRANT)) == GRANT
    assert len(synced) == 1
