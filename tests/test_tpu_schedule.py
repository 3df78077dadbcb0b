"""Reading the TPU compiler's listings, on one written by hand."""

import pytest

from benchmarks.tpu_schedule import read, read_dump

# The last bundle of the inner loop belongs to what comes after it: the compiler moved it in.
LISTING = """
// final bundles
     0   :  { %s1 = smov 0 } /* Start region 1 */
   0x1 LB: > { %s2 = sadd.s32 1, %s3 } /* Start region 40 :: Start region 41 */
   0x2   : > { %s4 = smov 1 }
   0x3 LB: >> { %v1 = vadd.f32 %v2, %v3 } /* Start region 50 */
   0x4   : >> { %p7_p1 = scmp.ge.s32.totalorder %s5, 8 /* loop exit test */ }
   0x4   : >> { %9 = sbr.rel (!%p7_p1) target = $region50 }
   0x5   :  { %p8_p2 = scmp.ge.s32.totalorder (%p7_p1), %s2, 6 /* loop exit test */ } /* End region 50 */
MIDDLE
   0x8   : > { %10 = sbr.rel (!%p8_p2) target = $region40 }
   0x9   : > { %s6 = smov 2 } /* End region 41 :: End region 40 */
   0xa   :  { %11 = sbr.rel (%p8_p2) target = $region60 }
   0xb   :  { %s7 = smov 3 } /* End region 1 */
"""
UNKNOWN = "\n".join(
    ["   0x6 LB: >> { %v4 = vmul.f32 %v5, %v6 } /* Start region 52 */"]
    + ["   0x7   : >> { %v7 = vmov }"] * 118
    + ["   0x7   : >> { %12 = sbr.rel (!%p9_p3) target = $region52 } /* End region 52 */", ""]
)


def written(folder, middle, name="17-attention_forward.1-72-final_bundles.txt"):
    path = folder / name
    path.write_text(LISTING.replace("MIDDLE\n", middle))
    return str(path)


def test_loops_multiply(tmp_path):
    schedule = read(written(tmp_path, ""))
    assert schedule.name == "attention_forward.1"
    # Three bundles outside, four in six trips, four in eight trips of each of them.
    assert schedule.listed == 3 + 6 * (4 + 8 * 4)
    # A grid of four steps is a loop of six trips.
    assert schedule.issued() == 3 + 4 * (4 + 8 * 4)
    assert schedule.issued(share=0.5) == 3 + 2 * (4 + 8 * 4)
    assert schedule.issued(grid=False) == schedule.listed


def test_loops_of_unknown_length_need_their_trips(tmp_path):
    schedule = read(written(tmp_path, UNKNOWN))
    assert schedule.listed == 3 + 6 * (4 + 8 * 4 + 120)
    assert schedule.issued((2.5,)) == 3 + 4 * (4 + 8 * 4 + 120 * 2.5)
    with pytest.raises(ValueError, match=r"1 loops of unknown trips, of \[120\] bundles: got 0"):
        schedule.issued()


def test_a_dump_is_read_once_and_removed(tmp_path):
    written(tmp_path, "")
    written(tmp_path, "", "18-fusion.3-72-final_bundles.txt")
    written(tmp_path, "", "17-attention_forward.1-71-schedule-analysis_final_bundles.txt")
    written(tmp_path, "", "17-<late-finalization>-71-final_bundles.txt")
    assert [x.name for x in read_dump(str(tmp_path))] == ["attention_forward.1", "fusion.3"]
    assert not list(tmp_path.iterdir())
