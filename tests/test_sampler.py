"""The sampler: distribution, truncation, ends, and independence of everything that must not matter."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_models import Markov, split, tiny
from scipy.stats import chisquare

from xpo_jax.algorithm import pairing
from xpo_jax.algorithm.sampler import make_sampler, row_keys
from xpo_jax.algorithm.sampling import CandidateSampling, Sampling, draw, truncate
from xpo_jax.runtime import sharding

PLAIN = {
    "max_new_tokens": 6,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}


def settings(**changes):
    return Sampling(**{**PLAIN, **changes})


def sample(
    model, tokens, lengths, *, vocab_size, end_tokens=(1, 2), seed=0, position=None, valid=None, **changes
):
    graphdef, params = model
    B = len(lengths)
    sampler = jax.jit(
        make_sampler(graphdef, settings(**changes), vocab_size=vocab_size, end_tokens=end_tokens, pad_token=0)
    )
    keys = row_keys(seed, 0, 0, jnp.arange(B) if position is None else jnp.asarray(position), 0)
    valid = jnp.ones(B, bool) if valid is None else jnp.asarray(valid)
    return jax.device_get(sampler(params, jnp.asarray(tokens), jnp.asarray(lengths), valid, keys))


def markov(seed=0, V=10):
    return split(Markov(np.random.default_rng(seed).normal(0, 1.5, (V, V))))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.3},
        {"temperature": 0.7, "top_k": 6, "top_p": 0.8, "min_p": 0.1},
    ],
    ids=str,
)
def test_frequencies_pass_a_chi_square_test(changes):
    """First tokens of 20,000 rows against probabilities computed in float64 NumPy, truncation included."""
    rows, V, masked = 20_000, 10, 2
    model = markov()
    row = np.asarray(model[1]["table"], np.float64)[4]
    got = sample(
        model,
        np.full((rows, 1), 4),
        np.ones(rows, np.int32),
        vocab_size=V - masked,
        max_new_tokens=1,
        **changes,
    )
    logits = row[: V - masked] / changes.get("temperature", 1.0)
    p = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-p)
    allowed = np.zeros(V - masked, bool)
    allowed[order[: changes.get("top_k") or V]] = True
    p = np.where(allowed, p, 0) / p[allowed].sum()
    mass = np.cumsum(p[order])
    allowed[order[1:][mass[:-1] >= changes.get("top_p", 1.0)]] = False
    p = np.where(allowed, p, 0) / p[allowed].sum()
    p[p < changes.get("min_p", 0.0) * p.max()] = 0
    p /= p.sum()
    counts = np.bincount(got.tokens[:, 0], minlength=V)
    assert counts[V - masked :].sum() == 0  # padded vocabulary rows are never drawn
    assert counts[: V - masked][p == 0].sum() == 0
    assert chisquare(counts[: V - masked][p > 0], p[p > 0] * rows).pvalue > 1e-4


def test_the_chi_square_test_can_fail():
    counts = np.bincount(
        sample(
            markov(), np.full((20_000, 1), 4), np.ones(20_000, np.int32), vocab_size=10, max_new_tokens=1
        ).tokens[:, 0],
        minlength=10,
    )
    logits = np.asarray(markov()[1]["table"], np.float64)[4] / 1.1  # another temperature
    p = np.exp(logits) / np.exp(logits).sum()
    assert chisquare(counts, p * 20_000).pvalue < 1e-4


def test_rows_with_temperatures_of_their_own_pass_a_chi_square_test():
    """Two candidates of each prompt: the settings' temperature and twice that, against float64 NumPy."""
    prompts, V = 20_000, 10
    graphdef, params = markov()
    sampler = make_sampler(graphdef, settings(max_new_tokens=1), vocab_size=V, end_tokens=(1, 2), pad_token=0)
    ones = jnp.ones(prompts, jnp.int32)
    keys = row_keys(0, 0, 0, jnp.arange(2 * prompts), 0)
    arguments = (params, 4 * ones[:, None], ones, ones > 0, keys)
    drawn = jax.jit(sampler)(*arguments, jnp.tile(jnp.array([1.0, 2.0]), prompts)).tokens[:, 0]
    for candidate, temperature in enumerate((1.0, 2.0)):
        p = np.exp(np.asarray(params["table"], np.float64)[4] / temperature)
        counts = np.bincount(drawn[candidate::2], minlength=V)
        assert chisquare(counts, p / p.sum() * prompts).pvalue > 1e-4
    np.testing.assert_array_equal(drawn[::2], jax.jit(sampler)(*arguments).tokens[::2, 0])


def test_rows_keep_their_temperatures_in_batches_that_shrink():
    """Of 48 rows, every second one at twice the temperature, each draws what it draws where all rows have its own."""
    _, _, graphdef, params = tiny()
    tokens, lengths, _, keys = prompts_of(48, 9)
    given = (params, tokens, lengths, jnp.ones(48, bool), keys)

    def drawn(temperatures):
        sampler = make_sampler(
            graphdef, settings(max_new_tokens=24), vocab_size=36, end_tokens=(1, 2, 3), pad_token=0
        )
        return jax.device_get(jax.jit(sampler)(*given, jnp.asarray(temperatures, jnp.float32)))

    mixed, cool, hot = drawn([1.0, 2.0] * 24), drawn([1.0] * 48), drawn([2.0] * 48)
    assert len(set(mixed.lengths.tolist())) > 5  # rows end at different tokens, so that batches shrink
    np.testing.assert_array_equal(mixed.tokens[::2], cool.tokens[::2])
    np.testing.assert_array_equal(mixed.tokens[1::2], hot.tokens[1::2])
    assert (cool.tokens != hot.tokens).any()


def test_draw_over_a_vocabulary_of_152k():
    """The mass in 20 bins of a distribution with a long tail is computed in float64 NumPy."""
    V, rows = 151_936, 4_000
    logits = np.random.default_rng(1).normal(0, 3, V).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum()
    uniform = jax.random.uniform(jax.random.key(0), (rows,))
    tokens = jax.jit(
        lambda u: jax.lax.map(lambda x: draw(jnp.asarray(logits)[None], x[None])[0], u, batch_size=50)
    )(uniform)
    bins = np.arange(V) * 20 // V
    assert (
        chisquare(np.bincount(bins[tokens], minlength=20), np.bincount(bins, weights=p) * rows).pvalue > 1e-4
    )


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_draw_never_takes_a_masked_token(uniform):
    logits = np.full((3, 1000), -np.inf, np.float32)
    logits[0, [3, 700]], logits[1, 999], logits[2, 0] = 0.0, 5.0, -80.0
    got = np.asarray(draw(jnp.asarray(logits), jnp.full(3, uniform)))
    assert got.tolist() == [3 if uniform < 0.5 else 700, 999, 0]


def test_draw_at_the_edges_of_blocks_takes_a_token_that_has_probability():
    """Top-k leaves 20 tokens; the uniforms are those next to each edge between two blocks of 256."""
    V, rows, at = 2560, 64, jax.jit(draw)
    generator = np.random.default_rng(0)
    for _ in range(200):
        logits = generator.normal(0, 2, V).astype(np.float32)
        logits[np.argsort(-logits)[20:]] = -np.inf
        p = np.exp(logits.astype(np.float64)).reshape(-1, 256).sum(1)
        edges = np.unique(np.cumsum(p)[:-1] / p.sum())
        # those next to an edge that jax.random.uniform can give
        steps = np.round(edges * 2**23)[:, None] + np.arange(-2, 3)
        uniform = np.resize(np.clip(steps, 0, 2**23 - 1) * 2.0**-23, rows).astype(np.float32)
        tokens = np.asarray(at(np.broadcast_to(logits, (rows, V)), uniform))
        assert np.isfinite(logits[tokens]).all()


def test_top_1_equals_greedy_and_follows_the_table():
    model = markov()
    table = np.asarray(model[1]["table"])
    tokens, lengths = np.array([[3], [4], [5], [9]]), np.ones(4, np.int32)
    greedy = sample(model, tokens, lengths, vocab_size=10, temperature=0.0, end_tokens=(99,))
    top_1 = sample(model, tokens, lengths, vocab_size=10, top_k=1, end_tokens=(99,))
    expected = np.zeros((4, 6), int)
    last = tokens[:, 0]
    for t in range(6):
        expected[:, t] = last = table[last].argmax(-1)
    np.testing.assert_array_equal(greedy.tokens, expected)
    np.testing.assert_array_equal(top_1.tokens, expected)


def test_lengths_count_the_first_end_token_and_padding_follows():
    """The chain 3 -> 4 -> ... -> 9 -> 3 has one certain successor; 6 and 8 end a response."""
    table = np.full((10, 10), -50.0)
    for a in range(3, 10):
        table[a, a + 1 if a < 9 else 3] = 50.0
    got = sample(
        split(Markov(table)),
        [[3], [6], [8], [7]],
        [1, 1, 1, 1],
        vocab_size=10,
        end_tokens=(6, 8),
        max_new_tokens=4,
        valid=[True, True, True, False],
    )
    assert got.tokens.tolist() == [[4, 5, 6, 0], [7, 8, 0, 0], [9, 3, 4, 5], [0, 0, 0, 0]]
    assert got.lengths.tolist() == [3, 2, 4, 0]
    assert got.finished.tolist() == [True, True, False, False]


def test_repetition_penalty_matches_transformers_rule():
    table = np.zeros((6, 6), np.float32)
    table[:, 2], table[:, 3], table[:, 4] = 3.0, 2.0, -1.0
    got = sample(
        split(Markov(table)),
        [[2, 5]],
        [1],
        vocab_size=6,
        end_tokens=(99,),
        temperature=0.0,
        repetition_penalty=2.0,
        max_new_tokens=3,
    )
    # 2 is in the prompt: 3 / 2 = 1.5 < 2; then 3 is seen: 1.0 < 1.5; the padding 5 is not "seen"
    assert got.tokens[0].tolist() == [3, 2, 2]


def test_rows_do_not_depend_on_padding_bucket_or_neighbours():
    _, _, unstacked, params = tiny()
    model = (unstacked, params)
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(3, 40, (4, 7)), np.array([7, 3, 5, 6], np.int32)
    whole = sample(model, tokens, lengths, vocab_size=38, max_new_tokens=10)
    assert len({tuple(row) for row in whole.tokens}) == 4
    for i in range(4):
        wide = np.full((2, 12), 39)
        wide[0, : lengths[i]], wide[1, :4] = tokens[i, : lengths[i]], [5, 6, 7, 8]
        alone = sample(
            model, wide, np.array([lengths[i], 4]), vocab_size=38, max_new_tokens=10, position=[i, 99]
        )
        np.testing.assert_array_equal(alone.tokens[0], whole.tokens[i])
        assert alone.lengths[0] == whole.lengths[i]


def in_batches_that_shrink(B, model, vocab_size, end_tokens, changes, mesh=None):
    """Return the samples of a batch of B rows, and of each row by itself, where a row is never moved."""
    rng = np.random.default_rng(B)
    tokens, lengths = (
        rng.integers(3, vocab_size, (B, 5)).astype(np.int32),
        rng.integers(1, 6, B).astype(np.int32),
    )
    valid = rng.random(B) < 0.9
    keys = row_keys(7, 0, 0, jnp.arange(B), 0)
    given = {"max_new_tokens": 24, **changes}
    function = make_sampler(
        model[0], settings(**given), vocab_size=vocab_size, end_tokens=end_tokens, pad_token=0
    )
    alone = jax.jit(function)
    arrays = (tokens, lengths, valid, keys)
    rows = [jax.device_get(alone(model[1], *(x[i : i + 1] for x in arrays))) for i in range(B)]
    expected = [np.concatenate(field) for field in zip(*rows, strict=True)]
    if mesh is None:
        return jax.device_get(jax.jit(function)(model[1], *arrays)), expected, None
    with jax.set_mesh(mesh):
        split = sharding.batch(mesh)
        jitted = jax.jit(
            function, in_shardings=(sharding.replicated(mesh), *[split] * 4), out_shardings=split
        )
        program = jitted.lower(model[1], *arrays).compile()
        placed = jax.device_put((model[1], *arrays), (sharding.replicated(mesh), *[split] * 4))
        return jax.device_get(program(*placed)), expected, program.as_text()


@pytest.mark.parametrize(
    ("B", "changes"),
    [
        (13, {"temperature": 0.6, "top_p": 0.9}),
        pytest.param(33, {"temperature": 0.0, "repetition_penalty": 1.3}, marks=pytest.mark.slow),
        pytest.param(21, {"repetition_penalty": 1.5}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_moved_rows_draw_what_they_would_have_drawn(B, changes):
    _, _, *model = tiny()
    got, expected, _ = in_batches_that_shrink(B, model, 38, (3, 4, 5, 6), changes)
    for array, expected_array in zip(got, expected, strict=True):
        np.testing.assert_array_equal(array, expected_array)
    assert len({*expected[1]}) > 3  # rows end at different tokens, so some are moved


def test_on_a_mesh_rows_are_moved_within_their_shard():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    _, _, *model = tiny()
    B, shards = 64, 4
    got, expected, text = in_batches_that_shrink(B, model, 38, (3, 4, 5, 6), {}, mesh)
    for array, expected_array in zip(got, expected, strict=True):
        np.testing.assert_array_equal(array, expected_array)
    batches = {
        int(n) for n in re.findall(r"f32\[(\d+),1,24,4\]", text)
    }  # of one device's own keys and values
    assert batches == {B // shards, B // shards // 2, B // shards // 4}
    gathered = re.findall(r"= \w+\[([\d,]*)\][^=]* all-gather(?:-start)?\(", text)
    # a row has 24 slots x 4 features of keys on a device; only the logits of the rows are larger
    assert not [shape for shape in gathered if shape.endswith(("24,4", "5,4"))]
    assert not re.search(r"all-to-all|collective-permute", text)


def test_keys_differ_by_every_number_they_are_made_of():
    base = (0, 1, 2, jnp.array([3]), 4)
    variants = [
        base,
        (9, *base[1:]),
        (0, 9, *base[2:]),
        (0, 1, 9, *base[3:]),
        (*base[:3], jnp.array([9]), 4),
        (*base[:4], 9),
    ]
    data = {tuple(np.asarray(jax.random.key_data(row_keys(*v)))[0]) for v in variants}
    assert len(data) == len(variants)


def test_keys_of_rows_of_several_steps_are_those_of_each_step():
    """By hand, everything that a key is made of is folded in, one after the other."""
    steps, positions = np.array([5, 5, 6], np.int32), np.array([0, 3, 0], np.int32)

    def by_hand(step, position):
        key = jax.random.key(7)
        for number in (1, step, position, 4):
            key = jax.random.fold_in(key, number)
        return jax.random.key_data(key)

    expected = [by_hand(*row) for row in zip(steps, positions, strict=True)]
    np.testing.assert_array_equal(jax.random.key_data(row_keys(7, 1, steps, positions, 4)), expected)
    of_five = jax.random.key_data(row_keys(7, 1, 5, positions[:2], 4))
    np.testing.assert_array_equal(of_five, expected[:2])


def test_truncation_keeps_at_least_the_likeliest():
    logits = jnp.array([[0.0, 5.0, 1.0]])
    tight = settings(top_p=1e-6, min_p=1.0, top_k=1)
    assert np.isfinite(np.asarray(truncate(logits, tight))).tolist() == [[False, True, False]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"min_p": 2.0}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
def test_bad_settings_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        settings(**change)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_second_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match=f"second_temperature is {temperature}, must be positive, or None"):
        CandidateSampling(**PLAIN, second_temperature=temperature)


# ---- prefill in sub-batches --------------------------------------------------------------------------


def prompts_of(B, P, V=36):
    rng = np.random.default_rng(B)
    tokens, lengths = rng.integers(3, V, (B, P)).astype(np.int32), rng.integers(1, P + 1, B).astype(np.int32)
    return tokens, lengths, rng.random(B) < 0.9, row_keys(7, 0, 0, jnp.arange(B), 0)


def sampler_of(graphdef, prefill_rows):
    return make_sampler(
        graphdef,
        settings(max_new_tokens=12),
        vocab_size=36,
        end_tokens=(1, 2),
        pad_token=0,
        prefill_rows=prefill_rows,
    )


def test_prefill_in_sub_batches_leaves_every_draw_as_it_is():
    """There are 8 rows, three at a time, so that the last sub-batch overlaps the one before."""
    _, _, graphdef, params = tiny()
    given = prompts_of(8, 9)
    all_at_once, in_parts = (
        jax.device_get(jax.jit(sampler_of(graphdef, n))(params, *given)) for n in (None, 3)
    )
    assert len({tuple(row) for row in all_at_once.tokens}) > 4
    jax.tree.map(np.testing.assert_array_equal, in_parts, all_at_once)


def test_prefill_in_sub_batches_on_a_mesh_encodes_each_shards_own_rows():
    """Each of eight shards encodes its two rows one at a time; no device gets another one's rows or keys."""
    _, _, graphdef, params = tiny()
    given = prompts_of(16, 9)
    expected = jax.device_get(jax.jit(sampler_of(graphdef, None))(params, *given))
    mesh = sharding.make_mesh(data=2, fsdp=4, tensor=1)
    with jax.set_mesh(mesh):
        split, everywhere = sharding.batch(mesh), sharding.replicated(mesh)
        jitted = jax.jit(
            sampler_of(graphdef, 1), in_shardings=(everywhere, *[split] * 4), out_shardings=split
        )
        program = jitted.lower(params, *given).compile()
        samples = jax.device_get(program(*jax.device_put((params, *given), (everywhere, *[split] * 4))))
    jax.tree.map(np.testing.assert_array_equal, samples, expected)
    text = program.as_text()
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)


@pytest.mark.parametrize("prefill_rows", [None, 3])
def test_candidates_of_one_prefill_draw_what_single_calls_draw(prefill_rows):
    _, _, graphdef, params = tiny()
    tokens, lengths, valid, _ = prompts_of(8, 9)
    sampler = jax.jit(sampler_of(graphdef, prefill_rows))
    keys = [row_keys(7, 0, 0, jnp.arange(8), number) for number in pairing.policy_numbers(3)]
    single = [jax.device_get(sampler(params, tokens, lengths, valid, key)) for key in keys]
    at_once = jax.device_get(sampler(params, tokens, lengths, valid, jnp.stack(keys, 1).reshape(-1)))
    for candidate, expected in zip(pairing.split(at_once, 3), single, strict=True):
        jax.tree.map(np.testing.assert_array_equal, candidate, expected)
    assert len({tuple(row) for row in at_once.tokens[valid.repeat(3)]}) > 2 * valid.sum()


def test_candidates_on_a_mesh_stay_with_their_prompts_shard():
    _, _, graphdef, params = tiny()
    tokens, lengths, valid, _ = prompts_of(16, 9)
    keys = jnp.stack([row_keys(7, 0, 0, jnp.arange(16), number) for number in (0, 2)], 1).reshape(-1)
    given = tokens, lengths, valid, keys
    expected = jax.device_get(jax.jit(sampler_of(graphdef, None))(params, *given))
    mesh = sharding.make_mesh(data=2, fsdp=4, tensor=1)
    with jax.set_mesh(mesh):
        split, everywhere = sharding.batch(mesh), sharding.replicated(mesh)
        jitted = jax.jit(
            sampler_of(graphdef, None), in_shardings=(everywhere, *[split] * 4), out_shardings=split
        )
        program = jitted.lower(params, *given).compile()
        samples = jax.device_get(program(*jax.device_put((params, *given), (everywhere, *[split] * 4))))
    jax.tree.map(np.testing.assert_array_equal, samples, expected)
    assert not re.search(r"all-gather|all-to-all|collective-permute", program.as_text())


def test_prefill_in_sub_batches_holds_the_activations_of_one():
    """XLA's temporaries for 8 rows, one at a time, take less than half of what they take at once."""
    _, _, graphdef, params = tiny()
    given = prompts_of(8, 256)
    at_once, in_parts = (
        jax.jit(sampler_of(graphdef, n)).lower(params, *given).compile().memory_analysis().temp_size_in_bytes
        for n in (None, 1)
    )
    assert in_parts < at_once / 2
