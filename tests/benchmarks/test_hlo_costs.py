"""Launches and bytes that are read from the text of a compiled program."""

from hlo_costs import Program, size_of

TEXT = """HloModule jit_step, is_scheduled=true

%fused_gather (param_0: s8[8,1024,16], param_1: s32[4]) -> s8[8,4,16] {
  %param_0 = s8[8,1024,16]{2,1,0} parameter(0)
  %param_1 = s32[4]{0} parameter(1)
  ROOT %gather.1 = s8[8,4,16]{2,1,0} gather(%param_0, %param_1), offset_dims={0,2}
}

%body (state: (s32[], /*index=1*/s8[8,1024,16], s32[4])) -> (s32[], s8[8,1024,16], s32[4]) {
  %state = (s32[], /*index=1*/s8[8,1024,16]{2,1,0}, s32[4]{0}) parameter(0)
  %step = s32[] get-tuple-element(%state), index=0
  %pool = s8[8,1024,16]{2,1,0} get-tuple-element(%state), index=1
  %pages = s32[4]{0} get-tuple-element(%state), index=2
  %read = s8[8,4,16]{2,1,0} fusion(%pool, %pages), kind=kLoop, calls=%fused_gather
  %next = s32[] add(%step, %step)
  ROOT %out = (s32[], s8[8,1024,16]{2,1,0}, s32[4]{0}) tuple(%next, %pool, %pages)
}

%condition (state.1: (s32[], s8[8,1024,16], s32[4])) -> pred[] {
  %state.1 = (s32[], s8[8,1024,16]{2,1,0}, s32[4]{0}) parameter(0)
  %step.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%step.1, %step.1), direction=LT
}

ENTRY %main (pool.1: s8[8,1024,16], pages.1: s32[4]) -> s8[8,1024,16] {
  %pool.1 = s8[8,1024,16]{2,1,0} parameter(0)
  %pages.1 = s32[4]{0} parameter(1)
  %zero = s32[] constant(0)
  %copy.1 = s32[4]{0} copy(%pages.1)
  %start = (s32[], s8[8,1024,16]{2,1,0}, s32[4]{0}) tuple(%zero, %pool.1, %copy.1)
  %while.1 = (s32[], s8[8,1024,16]{2,1,0}, s32[4]{0}) while(%start), condition=%condition, body=%body
  ROOT %result = s8[8,1024,16]{2,1,0} get-tuple-element(%while.1), index=1
}
"""


def test_sizes():
    assert size_of("(s32[], bf16[4,8]{1,0}, pred[3]{0})") == 4 + 64 + 3


def test_a_loop_costs_what_its_trips_do():
    program = Program.parse(TEXT)
    copy, trip = 2 * 16, (512 + 16 + 512) + (4 + 4 + 4) + (4 + 4 + 1)
    for trips in (1, 7):
        costs = program.costs(trips)
        # A copy; for each trip a gather, an addition, a comparison, and the test of what it says.
        assert costs.launches == 1 + 4 * trips
        assert costs.bytes == copy + trip * trips
