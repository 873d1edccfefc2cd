"""The run's states: what each event changes, and that no order of events leads out of the legal ones."""

import random

import pytest

from NMSWSegment.panel.run_state import Run, RunState

SIGNATURE = ("volume 1", "torso-unet", "segmentation 1", 1234)


@pytest.fixture
def a_running_run():
    run = Run()
    run.start(7, num_patches=5)
    return run


@pytest.fixture
def a_done_run(a_running_run):
    a_running_run.done(7, signature=SIGNATURE)
    return a_running_run


def test_idle_run_offers_to_segment_unless_blocked():
    run = Run()
    assert run.state is RunState.IDLE
    assert run.is_button_enabled(is_blocked=False) and not run.is_button_enabled(is_blocked=True)
    assert run.are_settings_enabled and run.is_num_patches_enabled


def test_running_run_offers_to_cancel_once(a_running_run):
    run = a_running_run
    assert run.state is RunState.RUNNING
    assert run.is_button_enabled(is_blocked=True)
    assert not run.are_settings_enabled and not run.is_num_patches_enabled
    run.request_cancel()
    assert run.state is RunState.CANCELLING
    assert not run.is_button_enabled(is_blocked=False) and not run.are_settings_enabled


def test_live_run_leaves_the_slider_free(a_done_run):
    a_done_run.start(8, num_patches=9, is_live=True)
    assert a_done_run.is_num_patches_enabled and not a_done_run.are_settings_enabled
    a_done_run.done(8, signature=SIGNATURE)
    a_done_run.start(9, num_patches=5)
    assert not a_done_run.is_num_patches_enabled


def test_start_during_a_run_is_refused(a_running_run):
    with pytest.raises(ValueError, match="run 8 was started while run 7 goes on"):
        a_running_run.start(8, num_patches=5)
    assert a_running_run.progress(7)


@pytest.mark.parametrize(
    "end", [lambda run: run.done(7, signature=SIGNATURE), lambda run: run.cancelled(7, by_user=True), lambda run: run.failed(7), Run.worker_died]
)
@pytest.mark.parametrize("is_cancelling", [False, True])
def test_every_end_leaves_an_idle_run(a_running_run, end, is_cancelling):
    run = a_running_run
    assert run.progress(7)
    if is_cancelling:
        run.request_cancel()
    assert end(run)
    assert run.state is RunState.IDLE
    assert not end(run)


def test_events_of_another_run_change_nothing(a_running_run):
    run = a_running_run
    for event in (run.progress, run.failed):
        assert not event(6)
    assert not run.done(6, signature=SIGNATURE) and not run.cancelled(6, by_user=True) and not run.failed(None)
    assert run.state is RunState.RUNNING
    assert run.progress(7)


def test_progress_is_not_shown_after_cancel(a_running_run):
    a_running_run.request_cancel()
    assert not a_running_run.progress(7)


def test_cancel_without_a_run_does_nothing():
    run = Run()
    run.request_cancel()
    assert run.state is RunState.IDLE


def test_live_update_follows_a_change_of_k_alone(a_done_run):
    assert a_done_run.wants_live_update(SIGNATURE, 9)
    assert a_done_run.wants_live_update(SIGNATURE, None) and a_done_run.wants_live_update(SIGNATURE, "auto")
    assert not a_done_run.wants_live_update(SIGNATURE, 5)
    for position in range(len(SIGNATURE)):
        other = SIGNATURE[:position] + ("other",) + SIGNATURE[position + 1 :]
        assert not a_done_run.wants_live_update(other, 9)


def test_live_update_waits_for_the_run_that_goes_on(a_done_run):
    a_done_run.start(8, num_patches=9, is_live=True)
    assert not a_done_run.wants_live_update(SIGNATURE, 12)
    a_done_run.done(8, signature=SIGNATURE)
    assert a_done_run.wants_live_update(SIGNATURE, 12) and not a_done_run.wants_live_update(SIGNATURE, 9)


def test_live_update_needs_a_result():
    run = Run()
    assert not run.wants_live_update(SIGNATURE, 9)
    run.start(1, num_patches=5)
    run.cancelled(1, by_user=True)
    assert not run.wants_live_update(SIGNATURE, 9)


def test_live_update_after_a_cancelled_one_compares_with_the_result_that_stands(a_done_run):
    a_done_run.start(8, num_patches=9, is_live=True)
    assert a_done_run.num_patches == 9
    a_done_run.cancelled(8, by_user=False)
    assert a_done_run.wants_live_update(SIGNATURE, 9) and not a_done_run.wants_live_update(SIGNATURE, 5)


def test_live_update_does_not_try_again_what_a_person_cancelled(a_done_run):
    a_done_run.start(8, num_patches=9, is_live=True)
    a_done_run.cancelled(8, by_user=True)
    assert not a_done_run.wants_live_update(SIGNATURE, 9) and not a_done_run.wants_live_update(SIGNATURE, 5)
    assert a_done_run.wants_live_update(SIGNATURE, 10)
    a_done_run.start(9, num_patches=10, is_live=True)
    a_done_run.done(9, signature=SIGNATURE)
    assert a_done_run.wants_live_update(SIGNATURE, 9)


@pytest.mark.parametrize("end", [lambda run: run.failed(8), Run.worker_died])
def test_live_update_stops_after_a_failure(a_done_run, end):
    a_done_run.start(8, num_patches=9, is_live=True)
    assert end(a_done_run)
    assert not a_done_run.wants_live_update(SIGNATURE, 12)


def test_any_order_of_events_leaves_a_legal_state():
    randomness = random.Random(0)
    for _ in range(300):
        run, started = Run(), 0
        for _ in range(40):
            before, run_id = run.state, randomness.choice([started, started, started - 1, None])
            event = randomness.choice(["start", "cancel", "progress", "done", "cancelled", "failed", "died"])
            is_ours = run_id == started and before is not RunState.IDLE
            if event == "start":
                try:
                    run.start(started + 1, num_patches=randomness.choice([0, 5, None, "auto"]), is_live=randomness.random() < 0.5)
                    started += 1
                    assert before is RunState.IDLE
                except ValueError:
                    assert before is not RunState.IDLE and run.state is before
            elif event == "cancel":
                run.request_cancel()
                assert run.state is (RunState.IDLE if before is RunState.IDLE else RunState.CANCELLING)
            elif event == "progress":
                assert run.progress(run_id) == (is_ours and before is RunState.RUNNING)
                assert run.state is before
            else:
                died = event == "died"
                ends = {
                    "done": lambda: run.done(run_id, signature=SIGNATURE),
                    "cancelled": lambda: run.cancelled(run_id, by_user=randomness.random() < 0.5),
                    "failed": lambda: run.failed(run_id),
                    "died": run.worker_died,
                }
                ended = ends[event]()
                assert ended == (is_ours or (died and before is not RunState.IDLE))
                assert run.state is (RunState.IDLE if ended else before)
            is_idle = run.state is RunState.IDLE
            assert run.are_settings_enabled == is_idle
            assert not (run.is_live and is_idle)
            assert not run.wants_live_update(SIGNATURE, 77) or is_idle
