"""Reading the TPU compiler's listings, on one written by hand."""

import pytest

from mha_jax.bench.tpu_schedule import read, read_dump

LISTING = """
// final bundles
     0   :  { %s1 = smov 0 } /* Start region 1 */
   0x1 LB: > { %s2 = sadd.s32 1, %s3 }
   0x2   : > { %s4 = smov 1 }
   0x3 LB: >> { %v1 = vadd.f32 %v2, %v3 }
   0x4   : >> { %p1 = scmp.ge.s32.totalorder %s5, 8 /* loop exit test */ }
   0x5   : > { %s6 = smov 2 }
MIDDLE
   0x8   : > { %p2 = scmp.ge.s32.totalorder %s2, 6 /* loop exit test */ }
   0x9   :  { %s7 = smov 3 }
"""
UNKNOWN = "\n".join(
    ["   0x6 LB: >> { %v4 = vmul.f32 %v5, %v6 }"] + ["   0x7   : >> { %v7 = vmov }"] * 119 + [""]
)


def written(folder, middle, name="17-attention_forward.1-72-final_bundles.txt"):
    path = folder / name
    path.write_text(LISTING.replace("MIDDLE\n", middle))
    return str(path)


def test_loops_multiply(tmp_path):
    schedule = read(written(tmp_path, ""))
    assert schedule.name == "attention_forward.1"
    # Two bundles outside, four in six trips, two in eight trips of each of them.
    assert schedule.listed == 2 + 6 * (4 + 8 * 2)
    # A grid of four steps is a loop of six trips.
    assert schedule.issued() == 2 + 4 * (4 + 8 * 2)
    assert schedule.issued(share=0.5) == 2 + 2 * (4 + 8 * 2)


def test_loops_of_unknown_length_need_their_trips(tmp_path):
    schedule = read(written(tmp_path, UNKNOWN))
    assert schedule.listed == 2 + 6 * (4 + 8 * 2 + 120)
    assert schedule.issued((2.5,)) == 2 + 4 * (4 + 8 * 2 + 120 * 2.5)
    with pytest.raises(ValueError, match=r"1 loops of unknown trips, of \[120\] bundles: got 0"):
        schedule.issued()


def test_a_dump_is_read_once_and_removed(tmp_path):
    written(tmp_path, "")
    written(tmp_path, "", "18-fusion.3-72-final_bundles.txt")
    written(tmp_path, "", "17-attention_forward.1-71-schedule-analysis_final_bundles.txt")
    written(tmp_path, "", "17-<late-finalization>-71-final_bundles.txt")
    assert [x.name for x in read_dump(str(tmp_path))] == ["attention_forward.1", "fusion.3"]
    assert not list(tmp_path.iterdir())
