"""What is read out of listings: lines as nvdisasm 12.9, cuobjdump 12.9 and LLVM 22 print them, far apart in one
kernel."""

import pytest

from qwenfit.kernels.proof.machine_code import MachineCode, read_amdgcn, read_sass

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function mm:
  REG:64 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:952 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
mm:
.text.mm:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   STL [R1], R2 ;
        /*0020*/                   LDG.E.U16 R9, desc[UR14][R22.64] ;
        /*0030*/              @!P0 BRA `(.L_x_3) ;
.L_x_0:
        /*0040*/                   IADD3 R5, R5, 0x1, RZ ;
.L_x_1:
        /*0050*/                   LDGSTS.E.BYPASS.LTC128B.128 [R59], desc[UR14][R22.64], !P0 ;
        /*0060*/               @P1 LDG.E.CONSTANT R8, desc[UR14][R22.64] ;
        /*0070*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0080*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0090*/                   NOP ;
        /*00a0*/              @!P0 BRA `(.L_x_1) ;
        /*00b0*/               @P2 BRA `(.L_x_0) ;
.L_x_2:
        /*00c0*/                   SHF.L.U32 R2, R2, 0x5, RZ ;
        /*00d0*/              @!P3 BRA `(.L_x_2) ;
.L_x_3:
        /*00e0*/                   LDL.LU R3, [R1] ;
        /*00f0*/                   UTMALDG.2D [UR16], [UR6] ;
        /*0100*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11] ;
        /*0110*/                   STG.E.128 desc[UR14][R2.64], R4 ;
        /*0120*/                   EXIT ;
.L_x_4:
        /*0130*/                   BRA `(.L_x_4);
        /*0140*/                   NOP;
"""
AMDGCN = """
mm:
	s_load_dwordx4 s[4:7], s[0:1], 0x0
	global_load_ushort v9, v[2:3], off
	scratch_store_dword off, v1, s32 ; 4-byte Folded Spill
.LBB0_1:                               ; %.lr.ph
	buffer_load_dwordx4 v[4:7], v1, s[12:15], 0 offen
	global_load_lds_dwordx4 v[4:5], off
	buffer_load_dword v8, off, s[0:3], 0 offset:4 ; 4-byte Folded Reload
	v_mfma_f32_32x32x8_bf16 v[0:15], v[20:21], v[22:23], v[0:15]
	s_nop 1
	s_cbranch_scc1 .LBB0_1
; %bb.2:
	global_load_b128 v[8:11], v[2:3], off
	global_load_d16_hi_b16 v8, v[2:3], off
	buffer_load_u8 v8, v1, s[12:15], 0 offen
	v_wmma_f32_16x16x16_bf16 v[0:7], v[8:15], v[16:23], v[0:7]
	ds_load_b128 v[70:73], v74
	s_endpgm
	s_code_end
		.amdhsa_next_free_vgpr 98
    .private_segment_fixed_size: 20
    .vgpr_count:     98
"""


def test_reads_sass() -> None:
    code = read_sass(SASS, USAGE, shared_bytes=49152, tensor_memory_columns=64, compile_s=3.0)
    assert code == MachineCode(
        registers=64,
        spill_bytes=24,  # stack and local
        spill_instructions=2,
        shared_bytes=49152,
        tensor_memory_columns=64,
        matrix={"HGMMA": 1, "HMMA": 1, "UTCHMMA": 1},
        loads={"16": 1, "128": 1, "32": 1, "tma": 1},
        loop_loads={"128": 1, "32": 1},
        instructions=19,  # no NOP, but the branch to itself behind the exit
        loop_instructions=5,  # .L_x_1: the longer of two innermost loops; the one around it does not count
    )


def test_reads_amdgcn() -> None:
    assert read_amdgcn(AMDGCN, shared_bytes=32768) == MachineCode(
        registers=98,
        spill_bytes=20,
        spill_instructions=2,
        shared_bytes=32768,
        tensor_memory_columns=0,
        matrix={"v_mfma_f32_32x32x8_bf16": 1, "v_wmma_f32_16x16x16_bf16": 1},
        loads={"16": 2, "128": 3, "32": 1, "8": 1},  # s_load is scalar; a reload is a load, too
        loop_loads={"128": 2, "32": 1},
        instructions=14,
        loop_instructions=5,
    )


def test_share_of_wide_loads_is_by_bytes_of_the_loop() -> None:
    code = read_sass(SASS, USAGE, 0)
    assert code.wide_share() == pytest.approx(128 / 160)
    no_loop = read_sass(SASS.replace("@!P0 BRA `(.L_x_1)", "EXIT").replace("@P2 BRA", "@P2 CALL"), USAGE, 0)
    assert no_loop.wide_share() == pytest.approx(256 / (256 + 32 + 16))  # a TMA load is at least 128 bits


def test_output_of_another_tool_is_refused() -> None:
    with pytest.raises(ValueError, match="what the kernel uses"):
        read_sass(SASS, "cuobjdump fatal: elf file is malformed", 0)
    with pytest.raises(ValueError, match=r"\.vgpr_count"):
        read_amdgcn(AMDGCN.replace(".vgpr_count", ".vgprs"), 0)
