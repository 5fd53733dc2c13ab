from __future__ import annotations

import pytest
from livedraft.cli.drafts import lineage
from livedraft.contracts.messages import Decision, DrafterVersion
from livedraft.swap.journal import Journal

from .conftest import Site


@pytest.fixture
def three(site: Site) -> Site:
    """Versions 1 < 2 < 3; 2 is live, 1 was."""
    for seed in (1, 2, 3):
        site.publish(seed, parent=str(seed - 1) if seed > 1 else None)
    site.registry.point("previous", "1")
    site.registry.point("live", "2")
    site.registry.point("candidate", "3")
    return site


def test_list_shows_versions_newest_first_with_prediction_and_observation(three: Site) -> None:
    three.registry.record("2", {"promote/predicted_accept_length": 2.5, "keep/observed_accept_length": 2.25})
    listed = three.json("drafts", "list")
    assert [(v["version"], v.get("aliases")) for v in listed] == [
        ("3", ["candidate"]),
        ("2", ["live"]),
        ("1", ["previous"]),
    ]
    row = next(line for line in three.run("drafts", "list").stdout.splitlines() if "live" in line)
    cells = [cell.strip() for cell in row.strip("│ ").split("│")]
    assert [cells[0], cells[1], cells[2], *cells[4:]] == ["2", "live", "1", "1234", "2.50", "2.25"]


def test_list_keeps_aliased_versions_however_old(site: Site) -> None:
    for seed in range(5):
        site.publish(seed)
    site.registry.point("live", "1")
    assert [v["version"] for v in site.json("drafts", "list", "-n", "2")] == ["5", "4", "1"]
    assert len(site.json("drafts", "list", "-n", "0")) == 5


def test_show_tells_lineage_measurements_and_what_was_decided(three: Site) -> None:
    three.registry.record("3", {"loss": 0.5})
    about_3 = Decision(
        action="promote", reason="goodput [1.3]", candidate="3", live="2", evidence={"ratio": 1.3}, at=9.0
    )
    three.registry.decide(about_3)
    three.registry.decide(Decision(action="reject", reason="other", candidate="1", at=8.0))
    found = three.json("drafts", "show", "candidate")
    assert found["version"]["version"] == "3"
    assert found["lineage"] == ["3", "2", "1"]
    assert [d["reason"] for d in found["decisions"]] == ["goodput [1.3]"]
    text = three.run("drafts", "show", "3").stdout
    for words in ("3 < 2 < 1", "loss", "0.5", "goodput [1.3]", "ratio=1.3", found["version"]["checksum"]):
        assert words in text
    assert three.json("drafts", "show", "2")["decisions"], "2 was live when it was decided"


def test_a_circle_of_parents_ends() -> None:
    one, two = (
        DrafterVersion(version="1", checksum="a", parent="2"),
        DrafterVersion(version="2", checksum="b", parent="1"),
    )
    assert lineage(one, [one, two]) == ["1", "2"]


@pytest.mark.parametrize("name", ["17", "nonsense"])
def test_an_unknown_version_or_alias_is_one_line(three: Site, name: str) -> None:
    result = three.run("drafts", "show", name)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert repr(name) in result.stderr


def test_decisions_are_the_history_oldest_first(three: Site) -> None:
    for number in range(4):
        three.registry.decide(Decision(action="keep", reason=f"number {number}", candidate="1", at=float(number)))
    assert [d["reason"] for d in three.json("drafts", "decisions", "-n", "2")] == ["number 2", "number 3"]
    assert len(three.json("drafts", "decisions", "-n", "0")) == 4
    assert "number 3" in three.run("drafts", "decisions").stdout


def test_promote_swaps_the_engine_then_moves_the_aliases_and_writes_history(three: Site) -> None:
    with three.serving(2, "2") as engine:
        result = three.run("drafts", "promote", "candidate", "--yes")
        assert result.exit_code == 0, result.output
        assert "version 3 is live, 2 was" in result.stdout
        assert engine.drafter == "3"
    assert [three.registry.resolve(a).version for a in ("live", "previous")] == ["3", "2"]  # type: ignore[union-attr]
    assert [(d.action, d.candidate, d.live, d.reason) for d in three.registry.decisions()] == [
        ("promote", "3", "2", "by hand")
    ]
    assert Journal(three.folder / "swap").exchange is None


def test_rollback_goes_back_to_what_was_live_before(three: Site) -> None:
    with three.serving(2, "2") as engine:
        result = three.run("drafts", "rollback", "--yes")
        assert result.exit_code == 0, result.output
        assert "version 1 is live, 2 was" in result.stdout
        assert engine.drafter == "1"
    assert three.registry.resolve("live").version == "1"  # type: ignore[union-attr]


@pytest.mark.parametrize(("answer", "swapped"), [("y\n", True), ("n\n", False), ("", False)])
def test_without_yes_it_asks(three: Site, answer: str, swapped: bool) -> None:
    with three.serving(2, "2") as engine:
        result = three.run("drafts", "promote", "3", says=answer)
        assert "from version 2 to version 3, past the gate?" in result.stdout
        assert (result.exit_code == 0, engine.drafter == "3") == (swapped, swapped)


def test_a_refusing_engine_is_one_line_and_nothing_moves(three: Site) -> None:
    with three.serving(2, "2") as engine:
        engine.refuses.add("3")
        result = three.run("drafts", "promote", "3", "--yes")
        assert (result.exit_code, result.stderr) == (1, "error: version 3: not for me\n")
        assert engine.drafter == "2"
    assert three.registry.resolve("live").version == "2"  # type: ignore[union-attr]


def test_promote_without_serving_is_one_line(three: Site) -> None:
    result = three.run("drafts", "promote", "3", "--yes")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "127.0.0.1:1" in result.stderr


def test_promote_what_is_live_is_refused(three: Site) -> None:
    with three.serving(2, "2"):
        result = three.run("drafts", "promote", "live", "--yes")
    assert (result.exit_code, result.stderr) == (1, "error: version 2 is live already\n")
