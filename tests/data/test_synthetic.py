"""The synthetic world: reproducible, disjoint splits, evidence where it says, readable as real files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import av
import numpy as np
import pytest

from omnisieve.data.synthetic import (
    SPLITS,
    all_questions,
    draw_frames,
    draw_questions,
    make_clip,
    make_waveform,
    manifest_line,
    manifest_text,
    world_hash,
    write_clip,
)
from omnisieve.data.synthetic.picture import CELL, COLOUR_VALUES
from omnisieve.data.synthetic.questions import VOCABULARY, WORDINGS, answer_words
from omnisieve.data.synthetic.sound import BASE_MEL, SAMPLE_RATE, TIMBRES, TOKEN, mel_to_hz

HASHES = Path(__file__).parents[2] / "data" / "testbed" / "manifest_hashes.json"


@pytest.mark.parametrize("domain", ["a", "b"])
def test_a_clip_is_a_pure_function_of_its_index(domain: str) -> None:
    one, again, other = (make_clip(domain, "train", i) for i in (3, 3, 4))
    assert one == again
    assert np.array_equal(draw_frames(one), draw_frames(again))
    assert np.array_equal(make_waveform(one), make_waveform(again))
    assert draw_questions(one) == draw_questions(again)
    assert one.events != other.events
    assert not np.array_equal(make_waveform(one), make_waveform(other))


def test_splits_and_domains_share_no_clip() -> None:
    clips = [make_clip(domain, split, i) for domain in "ab" for split in SPLITS for i in range(40)]
    assert len({clip.id for clip in clips}) == len({clip.seed for clip in clips}) == len(clips)
    assert len({(clip.events, clip.beeps) for clip in clips}) == len(clips)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("c", "train", 0), "unknown domain 'c'"), (("a", "dev", 0), "unknown split 'dev'"), (("a", "val", -1), "-1")],
)
def test_what_does_not_exist_is_refused(arguments: tuple[str, str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_clip(*arguments)


@pytest.mark.parametrize("domain", ["a", "b"])
def test_video_evidence_is_where_the_shape_is_seen(domain: str) -> None:
    clip = make_clip(domain, "val", 0)
    frames = draw_frames(clip).astype(float)
    assert clip.evidence()["video"] == sorted([e.second, e.row, e.column] for e in clip.events)
    for event in clip.events:
        y, x = event.row * CELL, event.column * CELL
        near = np.abs(frames[:, y : y + CELL, x : x + CELL] - COLOUR_VALUES[event.colour]).max(-1) < 35
        share = near.mean((1, 2)).reshape(-1, 2).min(1)
        assert share[event.second] > 0.08
        others = {(d.second, d.row, d.column) for d in (*clip.textures, *clip.cards)}
        assert (event.second, event.row, event.column) not in others


def test_cards_look_like_events_but_for_their_tile_and_change_every_second() -> None:
    for clip in (make_clip(domain, "val", i) for domain in "ab" for i in range(5)):
        low, high = clip.domain.cards
        per_second = [[c for c in clip.cards if c.second == s] for s in range(12)]
        assert all(low <= len(cards) <= high for cards in per_second)
        assert {c.shape for c in clip.cards} >= {e.shape for e in clip.events}
        assert {c.colour for c in clip.cards} >= {e.colour for e in clip.events}
        cells = [{(c.row, c.column) for c in cards} for cards in per_second]
        assert all(cells[s] != cells[s + 1] for s in range(11))
        frames = draw_frames(clip).astype(float)
        for card in clip.cards:
            edge = frames[2 * card.second, card.row * CELL + 2, card.column * CELL + 2 : card.column * CELL + 26]
            assert np.median(np.abs(edge - card.tint)) < 20


def test_audio_evidence_is_where_the_beep_sounds() -> None:
    for clip in (make_clip("a", "val", i) for i in range(5)):
        wave = make_waveform(clip)
        for event in clip.events:
            token = wave[event.token * TOKEN : (event.token + 1) * TOKEN]
            power = np.abs(np.fft.rfft(token * np.hanning(TOKEN))) ** 2
            frequencies = np.fft.rfftfreq(TOKEN, 1 / SAMPLE_RATE)
            partials = mel_to_hz(BASE_MEL[event.tone] + np.array((0, *TIMBRES[event.shape])))
            inside = (np.abs(frequencies[:, None] - partials) < 80).any(1)
            assert power[inside].sum() > 0.9 * power.sum()


def test_sounds_do_not_overlap_and_timbres_on_screen_are_unique_in_their_second() -> None:
    for clip in (make_clip(domain, "train", i) for domain in "ab" for i in range(30)):
        spans = [(e.token, e.length) for e in clip.events] + [(b.token, b.length) for b in clip.beeps]
        spans += [(c.token, 2) for c in clip.calls] + [(c.token, 1) for c in clip.chirps]
        tokens = [t for token, length in spans for t in range(token, token + length)]
        assert len(tokens) == len(set(tokens))
        assert max(tokens) < 299
        on_screen = {e.second: e.shape for e in clip.events}
        assert all(e.token // 25 == e.second for e in clip.events)
        assert all(on_screen.get(b.token // 25) != b.timbre for b in clip.beeps)


def test_questions_have_one_answer_and_none_follows_from_the_others() -> None:
    for clip in (make_clip("a", "test", i) for i in range(20)):
        answers: dict[str, set[str]] = {}
        for question in all_questions(clip):
            answers.setdefault(question.text, set()).add(question.answer)
        assert all(len(given) == 1 for given in answers.values())
        drawn = draw_questions(clip)
        assert len(drawn) == 16
        assert set(drawn) <= set(all_questions(clip))
        for group in range(6):
            edges = [tuple(q.family.split("_of_")) for q in drawn if q.group == group]
            nodes = {node for edge in edges for node in edge}
            assert len(edges) == len(nodes) - 1  # a tree: no fact closes a circle with others


def test_manifest_lines_are_well_formed() -> None:
    words = set(answer_words())
    assert len(words) == sum(len(part) for part in VOCABULARY.values())
    for text in manifest_text("b", "val", 5).splitlines():
        line = json.loads(text)
        users, assistants = line["messages"][::2], line["messages"][1::2]
        assert len(users) == len(assistants) == 16
        assert all(m["role"] == "user" and m["family"] in WORDINGS for m in users)
        assert all(m["role"] == "assistant" and m["content"] in words for m in assistants)
        assert [part["type"] for part in users[0]["content"]] == ["video", "text"]
        assert users[0]["content"][0]["video"] == f"videos/{line['id']}.mp4"
        assert all(isinstance(m["content"], str) for m in users[1:])
        assert all(0 <= g < 12 and 0 <= r < 6 and 0 <= c < 6 for g, r, c in line["evidence"]["video"])
        assert all(0 <= t < 299 for t in line["evidence"]["audio"])


def test_a_file_decodes_to_what_was_drawn(tmp_path: Path) -> None:
    clip = make_clip("a", "val", 1)
    path = tmp_path / write_clip(("a", "val", 1, str(tmp_path)))
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with av.open(str(path)) as container:
        blocks = list(container.decode(audio=0))
    wave = np.concatenate([block.to_ndarray()[0] for block in blocks])
    drawn, played = draw_frames(clip), make_waveform(clip)
    assert frames.shape == drawn.shape == (24, 168, 168, 3)
    assert np.abs(frames.astype(float) - drawn).mean() < 10
    assert (blocks[0].pts, blocks[0].sample_rate) == (0, SAMPLE_RATE)
    assert wave.shape == played.shape == (187 * 1024,)
    assert np.corrcoef(wave, played)[0, 1] > 0.98


def test_the_world_is_the_one_the_figures_were_measured_on() -> None:
    recorded = json.loads(HASHES.read_text())
    text = manifest_text("a", "val", 48)
    assert hashlib.sha256(text.encode()).hexdigest() == recorded["manifests"]["a/val=48"]
    assert world_hash([make_clip("b", "test", i) for i in range(2)]) == recorded["worlds"]["b/test[0:2]"]
    assert manifest_line(make_clip("a", "val", 0)) == json.loads(text.splitlines()[0])
