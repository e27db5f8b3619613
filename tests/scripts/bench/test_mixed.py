"""Mixed batches beside one prompt after the other: rounds take turns, and the ratio is of the same round."""

from scripts.bench import mixed


class Model:
    """Takes a second per call, as a clock of its own says."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def generate(self, prompts, **options):
        self.calls.append((prompts, options))
        self.now += 1.0 if options.get("mixed_batches") is None else 2.0


def test_rounds_take_turns_and_ratios_are_of_a_round(monkeypatch):
    model, prompts = Model(), ["a", "b", "c", "d"]
    monkeypatch.setattr(mixed.time, "perf_counter", lambda: model.now)
    found = mixed.compare(model, prompts, [16, None], rounds=2)
    assert found["one_by_one_s"] == 4.0
    assert found["mixed"]["16"] == found["mixed"]["default"] == {"seconds": 2.0, "images_per_s": 2.0, "ratio": 2.0}
    together = [options for asked, options in model.calls if asked == prompts]
    assert together == 3 * [
        {"num_candidates": 1, "batch_size": 16, "mixed_batches": True, "ranker": None},
        {"num_candidates": 1, "batch_size": None, "mixed_batches": True, "ranker": None},
    ]
    # Two calls that compile, then in each round four prompts and two batches.
    kinds = ["mixed" if "mixed_batches" in options else "one" for _, options in model.calls[3:]]
    assert kinds == 2 * (4 * ["one"] + 2 * ["mixed"])
