"""tools.plan --compile: reading a compiled program's text, and what its figures mean. No TPU or GPU compiler runs."""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fake_models import TINY
from tiny_run import tiny_config, write_config

from tools import plan
from tools.planner import (
    compile_report,
    compiled,
    cycles,
    estimate,
    findings,
    hlo,
    programs,
    topology,
    traffic,
)
from tools.planner.fit import Source, setup
from tools.planner.hardware import DEVICES
from tools.planner.judge import Judge
from tools.planner.program_code import PASS, SAMPLER, SCANNED, SHARED, program_code
from xpo_jax.algorithm.batch_shapes import BatchShapes
from xpo_jax.algorithm.packing import sequence_lengths
from xpo_jax.models import attention_kernels

# Hand-made, in the form of the TPU compiler's text: a loop whose body reads a weight, a slice of a stacked array, and a
# row of a table; brings an array onto the chip; updates a cache in place; and copies another one.
TEXT = """HloModule jit_sample, is_scheduled=true, input_output_alias={ {0}: (1, {}, may-alias) }

%fused_slice (param_0.1: bf16[4,8,128], param_1.2: s32[]) -> bf16[8,128] {
  %param_1.2 = s32[] parameter(1)
  %param_0.1 = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %dynamic-slice.1 = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0.1, %param_1.2), dynamic_slice_sizes={1,8,128}
  ROOT %bitcast.1 = bf16[8,128]{1,0:T(8,128)(2,1)} bitcast(%dynamic-slice.1)
}

%fused_update (param_0.3: f32[16,128], param_1.4: f32[1,128], param_2.5: s32[]) -> f32[16,128] {
  %param_0.3 = f32[16,128]{1,0} parameter(0)
  %param_1.4 = f32[1,128]{1,0} parameter(1)
  %param_2.5 = s32[] parameter(2)
  ROOT %dynamic-update-slice.2 = f32[16,128]{1,0} dynamic-update-slice(%param_0.3, %param_1.4, %param_2.5, %param_2.5)
}

%body (param.1: (s32[], bf16[4,8,128])) -> (s32[], bf16[4,8,128]) {
  %param.1 = (s32[]{:T(128)}, /*index=1*/bf16[4,8,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%param.1), index=0
  %stack = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%param.1), index=1
  %weight = f32[256,128]{1,0:T(8,128)} get-tuple-element(%param.1), index=2
  %cache = f32[16,128]{1,0} get-tuple-element(%param.1), index=3
  %new = f32[1,128]{1,0:T(1,128)S(1)} get-tuple-element(%param.1), index=4
  %fusion.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%stack, %i), kind=kLoop, calls=%fused_slice
  %kernel.1 = f32[8]{0:S(1)} custom-call(%new), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(sample)/pallas_call"}
  %copy-start.1 = (f32[256,128]{1,0:T(8,128)S(1)}, f32[256,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%weight)
  %copy-done.1 = f32[256,128]{1,0:T(8,128)S(1)} copy-done(%copy-start.1)
  %slice-start.1 = ((f32[256,128]{1,0:T(8,128)}), f32[64,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%weight), slice={[0:64], [0:128]}
  %fusion.2 = f32[16,128]{1,0} fusion(%cache, %new, %i), kind=kLoop, calls=%fused_update
  %copy.1 = f32[16,128]{1,0} copy(%fusion.2)
  %all-gather-start.1 = (f32[16,128]{1,0}, f32[32,128]{1,0}) all-gather-start(%copy.1), dimensions={0}
  %all-gather-done.1 = f32[32,128]{1,0} all-gather-done(%all-gather-start.1)
  %all-reduce.1 = f32[16]{0:S(1)} all-reduce(%new), to_apply=%sum
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[4,8,128]{2,1,0:T(8,128)(2,1)}) tuple(%i, %stack)
}

%cond (param.2: (s32[], bf16[4,8,128])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(24)
  %param.2 = (s32[]{:T(128)}, bf16[4,8,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%param.2), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%j, %constant.9), direction=LT, metadata={op_name="jit(sample)/decode/while/cond/lt"}
}

ENTRY %main.1_spmd (x: bf16[4,8,128], y: f32[16]) -> (s32[], bf16[4,8,128]) {
  %x = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %y = f32[16]{0} parameter(1)
  %fusion.7 = f32[16]{0} fusion(%y), kind=kLoop, calls=%fused_slice, metadata={op_name="jit(sample)/prefill/exp"}, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %tuple.9 = (s32[]{:T(128)}, bf16[4,8,128]{2,1,0:T(8,128)(2,1)}) tuple(%y, %x)
  ROOT %while.1 = (s32[]{:T(128)}, bf16[4,8,128]{2,1,0:T(8,128)(2,1)}) while(%tuple.9), condition=%cond, body=%body, metadata={op_name="jit(sample)/decode/while"}, backend_config={"window_config":{"estimated_cycles":"7"}}
}
"""  # noqa: E501
MODULE = hlo.parse(TEXT)
BODY = MODULE.computations["body"]


def moved(name):
    return tuple(traffic.traffic(MODULE, BODY, BODY[name]))


# ---- the text -------------------------------------------------------------------------------------


def test_an_instruction_of_several_lines_ends_neither_itself_nor_its_computation():
    """As those of Pallas kernels, whose attributes fill lines that begin with braces."""
    assert BODY["kernel.1"].op_name == "jit(sample)/pallas_call"
    assert {"copy-start.1", "tuple.1"} <= BODY.keys() and list(MODULE.computations) == [
        "fused_slice", "fused_update", "body", "cond", "main.1_spmd",
    ]  # fmt: skip


def test_parse_names_entry_operands_and_results():
    assert MODULE.entry == "main.1_spmd" and set(MODULE.computations) == {
        "fused_slice", "fused_update", "body", "cond", "main.1_spmd",
    }  # fmt: skip
    update = MODULE.computations["fused_update"]["dynamic-update-slice.2"]
    assert update.operands == ("param_0.3", "param_1.4", "param_2.5", "param_2.5")
    assert [leaf.dims for leaf in BODY["copy-start.1"].leaves] == [(256, 128), (256, 128), ()]
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule empty\n")


@pytest.mark.parametrize(
    ("dtype", "dims", "layout", "size"),
    [
        (
            "bf16",
            (8, 2, 128, 64),
            "2,3,1,0:T(8,128)(2,1)",
            8 * 2 * 64 * 128 * 2,
        ),  # the third axis is the minor one
        (
            "bf16",
            (8, 2, 1, 64),
            "2,3,1,0:T(8,128)(2,1)",
            8 * 2 * 64 * 128 * 2,
        ),  # a single position fills a tile
        ("f32", (5, 100), "1,0:T(8,128)", 8 * 128 * 4),
        ("f32", (5, 100), "1,0", 5 * 100 * 4),
        ("pred", (100,), "0", 100),
        ("s4", (100,), "0", 50),
        ("f8e4m3fn", (100,), "0", 100),
        ("f32", (), ":T(128)", 4),
    ],
)
def test_bytes_of_an_array_include_the_padding_of_its_tiles(dtype, dims, layout, size):
    assert hlo.Leaf(dtype, dims, layout).bytes == size


def test_traffic_of_slices_updates_and_arrays_on_the_chip():
    assert moved("fusion.1") == (8 * 128 * 2, 0)  # a slice of the stack, into the chip
    assert moved("copy-start.1") == (256 * 128 * 4, 0)
    assert moved("slice-start.1") == (64 * 128 * 4, 0)
    assert moved("copy-done.1") == moved("stack") == (0, 0)
    assert moved("fusion.2") == (0, 128 * 4)  # in place: one row, which comes from the chip
    assert moved("copy.1") == (16 * 128 * 4, 16 * 128 * 4)
    assert moved("all-gather-start.1") == (16 * 128 * 4, 32 * 128 * 4)
    once = traffic.total(MODULE, "body")
    assert once == (
        2048 + 131072 + 32768 + 8192 + 8192,
        512 + 8192 + 16384,
    )
    entry = MODULE.computations[MODULE.entry]
    assert hlo.trips(MODULE, entry["while.1"]) == 24
    assert traffic.traffic(MODULE, entry, entry["while.1"]) == (24 * once.read, 24 * once.written)


# As the GPU compiler writes it: the sums of a split product, of which some columns are needed; probabilities, computed
# from logits where one block of them is chosen; and logits of which a second result needs all.
ON_A_GPU = """
%column (p: f32[4,8,96]) -> f32[8,16] {
  %p = f32[4,8,96]{2,1,0} parameter(0)
  %zero = f32[] constant(0)
  %sum = f32[8,96]{1,0} reduce(%p, %zero), dimensions={0}, to_apply=%sum_of
  %rounded = bf16[8,96]{1,0} convert(%sum)
  ROOT %slice.1 = bf16[8,16]{1,0} slice(%rounded), slice={[0:8], [0:16]}
}

%chosen (logits: f32[8,1000], top: f32[8], at: s32[8,2]) -> f32[8,256] {
  %logits = f32[8,1000]{1,0} parameter(0)
  %top = f32[8]{0} parameter(1)
  %at = s32[8,2]{1,0} parameter(2)
  %zero.1 = f32[] constant(0)
  %tops = f32[8,1000]{1,0} broadcast(%top), dimensions={0}
  %less = f32[8,1000]{1,0} subtract(%logits, %tops)
  %exp = f32[8,1000]{1,0} exponential(%less)
  %padded = f32[8,1024]{1,0} pad(%exp, %zero.1), padding=0_0x0_24
  %blocks = f32[8,4,256]{2,1,0} bitcast(%padded)
  ROOT %gather.1 = f32[8,256]{1,0} gather(%blocks, %at), offset_dims={1}
}

%both (logits.1: f32[8,1000]) -> (f32[8,16], f32[8,1000]) {
  %logits.1 = f32[8,1000]{1,0} parameter(0)
  %exp.1 = f32[8,1000]{1,0} exponential(%logits.1)
  %slice.2 = f32[8,16]{1,0} slice(%exp.1), slice={[0:8], [0:16]}
  ROOT %tuple.1 = (f32[8,16]{1,0}, f32[8,1000]{1,0}) tuple(%slice.2, %exp.1)
}

ENTRY %main (a: f32[4,8,96], b: f32[8,1000], c: f32[8], d: s32[8,2]) -> f32[8,256] {
  %a = f32[4,8,96]{2,1,0} parameter(0)
  %b = f32[8,1000]{1,0} parameter(1)
  %c = f32[8]{0} parameter(2)
  %d = s32[8,2]{1,0} parameter(3)
  %fusion.1 = bf16[8,16]{1,0} fusion(%a), kind=kLoop, calls=%column
  %fusion.2 = (f32[8,16]{1,0}, f32[8,1000]{1,0}) fusion(%b), kind=kLoop, calls=%both
  ROOT %fusion.3 = f32[8,256]{1,0} fusion(%b, %c, %d), kind=kLoop, calls=%chosen
}
"""


def test_traffic_of_a_fusion_counts_what_its_slices_need_of_an_operand():
    module = hlo.parse(ON_A_GPU)
    entry = module.computations["main"]
    moved = {name: tuple(traffic.traffic(module, entry, entry[name])) for name in entry}
    assert moved["fusion.1"] == (4 * 8 * 16 * 4, 8 * 16 * 2)  # four partial sums of each element
    # of the logits a block per row, for which padding counts as if it were read: 250 of 256
    assert moved["fusion.3"] == (8 * 250 * 4 + 8 * 4 + 8 * 2 * 4, 8 * 256 * 4)
    assert moved["fusion.2"] == (8 * 1000 * 4, (8 * 16 + 8 * 1000) * 4)


def test_trips_that_the_text_does_not_state_are_unknown():
    text = TEXT.replace("compare(%j, %constant.9)", "compare(%j, %j)")
    module = hlo.parse(text)
    assert hlo.trips(module, module.computations[module.entry]["while.1"]) is None
    text = text.replace('"estimated_cycles":"7"}', '"estimated_cycles":"7"},"known_trip_count":{"n":"5"}')
    module = hlo.parse(text)
    assert hlo.trips(module, module.computations[module.entry]["while.1"]) == 5


def test_collectives_are_counted_once_by_kind():
    assert compiled.count_collectives(MODULE.instructions()) == Counter({"all-gather": 1, "all-reduce": 1})


def test_cycles_of_a_part_and_of_a_loop():
    assert cycles.total(MODULE, MODULE.entry) == 1007
    assert cycles.total(MODULE, MODULE.entry, lambda i: "/prefill/" in i.op_name) == 1000
    text = TEXT.replace(
        "calls=%fused_update", 'calls=%fused_update, backend_config={"estimated_cycles":"10"}'
    )
    module = hlo.parse(text)
    assert cycles.total(module, module.entry) == 1007 + 24 * 10


def test_prefill_by_splash_is_without_the_flops_of_its_scores():
    """The kernel has no cycles, so its FLOPs would be those of nothing."""
    planned, _ = setup(Source("paraphrase:Qwen/Qwen2.5-0.5B-Instruct", (), 8, None, "tpu"))
    sampler = compiled.Compiled("sample P=1024", *[0] * 7, MODULE)
    (by_splash,) = cycles.parts(planned, [sampler])
    einsum = dataclasses.replace(planned, kernels=attention_kernels.ONLY_EINSUM)
    (by_einsum,) = cycles.parts(einsum, [sampler])
    assert by_splash.name == "sample P=1024: prefill without its kernel"
    assert by_einsum.name == "sample P=1024: prefill"
    assert by_splash.cycles == by_einsum.cycles == 1000
    # 8 rows a device, 24 layers, 14 heads of 64 numbers: two products, two FLOPs each
    assert by_einsum.flops - by_splash.flops == 8 * 24 * 14 * 64 * 4 * 1024**2


# ---- topologies ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "device", "described"),
    [
        ("v5e-8", 8, "tpu-v5e", "v5e:2x4"),
        ("v6e-16", 16, "tpu-v6e", "v6e:4x4"),
        ("v5p-8", 4, "tpu-v5p", "v5p:2x2x1"),  # Google Cloud counts the cores of v5p, of which a chip has two
        ("h100x8", 8, "h100-80gb", "1x1x8"),
        ("h200x1", 1, "h200", "1x1x1"),
    ],
)
def test_parse_topology_of_a_name(name, count, device, described):
    parsed = topology.parse(name)
    assert (parsed.count, parsed.hardware) == (count, DEVICES[device])
    assert described in parsed.arguments.values()


@pytest.mark.parametrize("name", ["v5e", "v5e-9", "v5ex8", "h100-8", "h100x9", "abacus-8", ""])
def test_parse_topology_that_is_unknown_names_the_known_ones(name):
    with pytest.raises(ValueError, match=r"no topology; known are v5e-1\|4\|8.*h100x1 to x8"):
        topology.parse(name)


@pytest.mark.parametrize(("name", "extra"), [("v5e-8", "tpu"), ("h100x8", "cuda12")])
def test_devices_without_the_compiler_name_the_extra(monkeypatch, name, extra):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ValueError, match=rf"is missing; install it with: .*xpo-jax\[{extra}\]"):
        topology.devices(topology.parse(name))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--compile"], "add --topology=NAME"),
        (["--topology=v5e-8", "--devices=8"], "leave --devices and --device out"),
        (["--longest"], "these are options of --compile"),
    ],
)
def test_main_contradictory_flags_are_refused_in_one_line(capsys, flags, expected):
    assert plan.main(["--config=paraphrase", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and expected in err


def test_main_topology_plans_its_devices(capsys):
    assert plan.main(["--config=paraphrase", "--topology=v5p-8"]) == 0
    out, _ = capsys.readouterr()
    assert "mesh data 4, fsdp 1, tensor 1" in out and "of 88.48 GiB" in out


# ---- programs of a run, by this machine's compiler -----------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return the longest programs of a tiny run on one device, compiled for it."""
    config = tiny_config(tmp_path_factory.mktemp("run"))
    config.mesh.data = config.mesh.fsdp = config.mesh.tensor = 1
    spec = write_config(tmp_path_factory.mktemp("config") / "config.py", config)
    planned, loaded = setup(Source(spec, (), 1, None))
    planned = dataclasses.replace(planned, dtype=np.dtype(np.float32))
    declared = programs.declare(planned, loaded, jax.devices()[:1])
    built, refused = compiled.compile_all(programs.longest(declared.programs), lambda line: None)
    assert refused == [] and declared.has_tokenizer
    return SimpleNamespace(planned=planned, built=built, by_name={p.name: p for p in built})


NAMES = ["init", "for_sampling", "fingerprint", "zeros", "apply", "sample", "score", "accumulate"]


def test_programs_are_those_that_a_run_declares(tiny):
    assert [program.name for program in tiny.built] == NAMES
    assert (
        tiny.by_name["init"].donated and tiny.by_name["apply"].donated and not tiny.by_name["zeros"].donated
    )


def test_phases_add_up_what_is_live_at_once(tiny):
    plan = estimate.memory(tiny.planned)
    resident = sum(plan["sample"][part] for part in ("master weights", "optimizer state", "reference"))
    live = compiled.phases(tiny.planned, tiny.built)
    assert list(live) == ["sample", "score", "gradient", "apply"]
    assert live["sample"] - tiny.by_name["sample"].total == pytest.approx(resident, rel=0.01)
    gradient = (
        tiny.by_name["accumulate"].total + plan["gradient"]["optimizer state"] + plan["gradient"]["reference"]
    )
    assert live["gradient"] == pytest.approx(gradient, rel=0.01)
    assert compiled.phases(tiny.planned, [p for p in tiny.built if p.name != "init"]) == {}


def test_code_of_programs_that_were_not_compiled_counts_as_the_longest_of_their_name():
    sizes = {"sample P=8": 5, "score W=16": 3, "zeros": 1}
    built = [SimpleNamespace(label=label, name=label.split()[0], code=code) for label, code in sizes.items()]
    declared = [
        (label, None)
        for label in ("sample P=4", "sample P=8", "score W=12", "score W=16", "zeros", "refused")
    ]
    assert compile_report.all_code(built, declared) == 5 + 5 + 3 + 3 + 1


def test_planned_code_is_that_of_every_program_of_a_run_on_a_tpu(tiny):
    tpu = dataclasses.replace(tiny.planned, platform="tpu", buckets=3)
    assert program_code(tiny.planned) == program_code(dataclasses.replace(tpu, platform="gpu")) == 0
    layers = tpu.model.num_hidden_layers
    widths = len(sequence_lengths(tpu.prompt_tokens, tpu.response_tokens))
    per_layer = (program_code(tpu) - (widths + 1) * SCANNED) / layers
    assert per_layer == 3 * SAMPLER + widths * PASS
    for reference_steps, candidates in ((2, 1), (1, 4), (2, 4)):
        shapes = BatchShapes(
            batch_size=8,
            prompt_buckets=(8,),
            micro_batch_rows=1,
            chunk_tokens=64,
            prefetch_depth=reference_steps,
            candidates=candidates,
        )
        more = dataclasses.replace(tpu, reference_steps=reference_steps, candidates=candidates)
        samplers = 3 * (len(shapes.sampled) - 1)
        assert program_code(more) - program_code(tpu) == layers * samplers * SAMPLER
    deep = dataclasses.replace(tpu, model=dataclasses.replace(tpu.model, num_hidden_layers=SHARED))
    assert program_code(deep) == pytest.approx(SHARED / 10 * per_layer + (widths + 1) * SCANNED, abs=1)
    for new_tokens, of_a_bucket in ((0, PASS), (8, SAMPLER)):
        judge = Judge(None, 8, 32, 1, new_tokens, buckets=2)
        assert (
            program_code(dataclasses.replace(tpu, judge=judge)) - program_code(tpu)
            == layers * 2 * of_a_bucket
        )
    memory = estimate.memory(tpu)
    assert {parts["code"] for parts in memory.values()} == {program_code(tpu)}
    assert compiled.planned_phases(tpu) == {
        phase: sum(parts.values()) - program_code(tpu) for phase, parts in memory.items()
    }


def test_planned_total_of_programs_without_temporaries_is_exact(tiny):
    for name in ("init", "zeros"):
        program = tiny.by_name[name]
        assert compiled.planned_total(tiny.planned, program.label) == pytest.approx(program.total, rel=0.01)
    assert compiled.planned_total(tiny.planned, "score W=8") is None
    prefetching = dataclasses.replace(tiny.planned, reference_steps=2)
    ahead, one = (compiled.planned_total(prefetching, f"{name} P=8") for name in ("ahead", "sample"))
    assert ahead > one == compiled.planned_total(tiny.planned, "sample P=8")


def test_findings_of_a_run_as_it_is_are_none(tiny):
    loops = {"sample": compiled.decode_loop(tiny.planned, tiny.by_name["sample"])}
    assert loops["sample"].floor == sum(plan.work.decode_bytes(tiny.planned))
    assert not loops["sample"].collectives and sum(loops["sample"].moved) > loops["sample"].floor
    loops["sample"] = loops["sample"]._replace(caches_written=0)  # XLA's CPU compiler copies small caches
    assert findings.findings(tiny.planned, tiny.built, loops, np.dtype(np.float32)) == []


def test_findings_name_the_program_and_what_is_wrong(tiny):
    planned, sample = tiny.planned, tiny.by_name["sample"]
    lost = tiny.by_name["apply"]._replace(aliased=0)
    (line,) = findings.findings(planned, [lost], {}, np.dtype(np.float32))
    assert line.startswith("apply: ") and "donated" in line
    (line,) = findings.findings(planned, [sample], {}, np.dtype(ml_dtypes.bfloat16))
    assert line.startswith("sample P=") and "arrive as f32, the mesh computes in bfloat16" in line
    loop = compiled.DecodeLoop(traffic.Traffic(9, 9), 100, 0, 0, Counter())
    weights = plan.work.decode_bytes(planned)[0]
    for wrong, text in (
        (loop._replace(gathered=weights), "gathers"),
        (loop._replace(caches_written=6), "complete keys and values"),
    ):
        (line,) = findings.findings(planned, [], {"sample P=8": wrong}, np.dtype(np.float32))
        assert line.startswith("sample P=8: ") and text in line
    fine = loop._replace(gathered=weights // 4, caches_written=4)
    assert findings.findings(planned, [], {"sample P=8": fine}, np.dtype(np.float32)) == []


LOOP = """
%body (p: (bf16[8,2,16,4])) -> (bf16[8,2,16,4]) {
  %p = (bf16[8,2,16,4]{3,2,1,0}) parameter(0)
  %cache = bf16[8,2,16,4]{3,2,1,0} get-tuple-element(%p), index=0
  %token = bf16[8,2,1,4]{3,2,1,0} get-tuple-element(%p), index=1
  %updated = bf16[8,2,16,4]{3,2,1,0} dynamic-update-slice(%cache, %token, %token)
  COPY
  ROOT %tuple = (bf16[8,2,16,4]{3,2,1,0}) tuple(%updated)
}
ENTRY %main (p: bf16[8]) -> bf16[8] {
  ROOT %p = bf16[8]{0} parameter(0)
}
"""


@pytest.mark.parametrize(
    ("copy", "size"),
    [
        ("", 0),
        ("%c = bf16[8,2,16,4]{3,2,1,0} copy(%updated)", 8 * 2 * 16 * 4 * 2),
        ("%c = bf16[8,16,2,4]{3,2,1,0} transpose(%updated), dimensions={0,2,1,3}", 8 * 2 * 16 * 4 * 2),
        ("%c = (bf16[8,2,16,4]{3,2,1,0}, bf16[8,2,16,4]{3,2,1,0:S(1)}, u32[]) copy-start(%updated)", 2048),
        ("%c = (bf16[8,2,16,4]{3,2,1,0:S(1)}, bf16[8,2,16,4]{3,2,1,0}, u32[]) copy-start(%updated)", 0),
        ("%c = bf16[8,2,16,5]{3,2,1,0} add(%updated, %updated)", 0),
    ],
)
def test_caches_written_are_complete_keys_and_values(tiny, copy, size):
    c = dataclasses.replace(TINY, num_key_value_heads=2, head_dim=4)
    s = dataclasses.replace(tiny.planned, model=c, batch_size=8, prompt_tokens=9, response_tokens=16)
    module = hlo.parse(LOOP.replace("COPY", copy))
    assert compiled.caches_written(s, module, module.computations["body"]) == size


def test_report_status_is_1_for_findings_and_for_what_does_not_fit(tiny):
    def status(built=tiny.built, refused=(), memory=1e9, dtype=np.float32, code=0):
        device = DEVICES["tpu-v5e"]._replace(memory=memory)
        built = [p for p in built if p.name != "sample"]  # see above: XLA copies small caches
        return compile_report.report(
            tiny.planned, built, refused, device=device, clock=None, dtype=np.dtype(dtype), code=code
        )

    text, code = status()
    assert code == 0 and "fits: " in text and "finding" not in text
    for program in tiny.built:
        assert (program.label in text) == (program.name != "sample")
    assert status(memory=1e3)[1] == 1 and "does not fit" in status(memory=1e3)[0]
    text, code = status(refused=[compiled.Refused("accumulate W=8", "out of device memory")])
    assert code == 1 and "refused: accumulate W=8: out of device memory" in text
    text, code = status(dtype=jnp.bfloat16)
    assert code == 1 and "finding: score" in text
    assert status(code=0)[1] == 0 and status(code=1e9)[1] == 1  # code takes memory, too


def test_longest_has_one_program_of_each_name():
    declared = [
        ("init", None),
        ("sample P=8", None),
        ("score W=8", None),
        ("sample P=16", None),
        ("score W=24", None),
    ]
    assert [label for label, _ in programs.longest(declared)] == ["init", "sample P=16", "score W=24"]
