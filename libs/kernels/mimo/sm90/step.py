"""The decode kernel: one token for each of some sequences, whose states lie in slots and are moved on in place.

One thread block per head and sequence reads its state once and writes it once. The entry on torch tensors: `decode`.
The same arithmetic in torch, without slots: `libs.kernels.mimo.step`.
"""
# mypy: disable-error-code="valid-type,no-untyped-def,untyped-decorator"
# B sequences of this step  L slots  H heads  G groups  R rank  N state  P head width  A rotary angles
# W = P up to a power of two  bb, bh block indices: sequence, head

# No `from __future__ import annotations`: as strings, parameter types would see only names that the body uses too.

from typing import Any, NamedTuple

TILE = 4096  # numbers of the state in registers at a time: 32 a thread

# In parts, since TileLang's C generator prints seven digits; the first part times a whole number is exact.
TWO_PI = (6.28125, 1.935307e-3, 1.795865e-10)
PI = (3.140625, 9.676535e-4, 8.979324e-11)
TURNS = 0.1591549  # 1 / 2 pi


class StepSpec(NamedTuple):
    """One compiled variant. The numbers of sequences and of slots are not part of it: they may change every step."""

    H: int
    G: int
    R: int
    N: int
    P: int
    divisor: int = 4
    z: bool = True
    out: bool = True
    d: bool = True
    norm: bool = False
    norm_eps: float = 1e-5

    @property
    def A(self) -> int:
        """Rotary angles."""
        return self.N // self.divisor

    @property
    def rows(self) -> int:
        """Rows of the state in registers at a time."""
        return max(1, min(self.W, TILE // self.N))

    @property
    def W(self) -> int:
        """P up to a power of two: only these have a layout of threads for a sum over them. What is behind P is zero
        and is not stored."""
        return 1 << (self.P - 1).bit_length()


def _times(T: Any, factor: Any, parts: tuple[float, float, float]) -> Any:
    """factor * (the constant in parts)."""
    return factor * T.number(parts[0]) + (factor * T.number(parts[1]) + factor * T.number(parts[2]))


def _less_turns(T: Any, angle: Any, turns: Any) -> Any:
    """angle - 2 pi turns, the largest part first: what is left of it is exact."""
    return ((angle - turns * T.number(TWO_PI[0])) - turns * T.number(TWO_PI[1])) - turns * T.number(TWO_PI[2])


def make_step(T: Any, spec: StepSpec) -> Any:
    """out (B,H,P), or (B,R,H,P) without MIMO_Out, and the four parts of the state moved on in their slots.

    A row whose slot is negative is padding: its output is 0 and it writes no state. Slots are distinct.
    """
    H, G, R, N, P = spec[:5]
    A, W, rows, half, hpg = spec.A, spec.W, spec.rows, N // 2, H // G
    assert N & (N - 1) == 0, f"N = {N} is not a power of two: the sum over it would have no layout of threads"
    B, L = T.dynamic("n_sequences"), T.dynamic("n_slots")
    ds, ns = (H,) if spec.d else (1,), (H, P) if spec.norm else (1, 1)
    zs, zw = ((B, H, P), (H, R, P)) if spec.z else ((1, 1, 1), (1, 1, 1))
    os_, ow = ((B, H, P), (H, R, P)) if spec.out else ((B, R, H, P), (1, 1, 1))

    @T.macro
    def turn_angle(angles, dt, angle, slot, bb, bh, angle_sh, cos_sh, sin_sh):
        for a in T.Parallel(A):
            far = angle[slot, bh, a] + _times(T, T.tanh(angles[bb, bh, a]) * dt[bb, bh], PI)
            near = _less_turns(T, far, T.floor(far * T.number(TURNS)))
            # TURNS is rounded, so a turn may have been counted a hair too early or too late
            under, over = _less_turns(T, near, T.number(1.0)), _less_turns(T, near, T.number(-1.0))
            angle_sh[a] = T.if_then_else(near < T.zero(), over, T.if_then_else(under >= T.zero(), under, near))
        for a in T.Parallel(A):
            # Not `cos, sin`: names become C variables and would hide the functions
            cosine, sine = T.cos_sin(angle_sh[a])
            cos_sh[a] = cosine
            sin_sh[a] = sine

    @T.macro
    def rotate(raw, bias, cos_sh, sin_sh, done_sh, bb, bh):
        for r, a in T.Parallel(R, A):
            first = T.wide(raw[bb, r, bh // hpg, a]) + bias[bh, r, a]
            other = T.wide(raw[bb, r, bh // hpg, half + a]) + bias[bh, r, half + a]
            done_sh[r, a] = first * cos_sh[a] - other * sin_sh[a]
            done_sh[r, half + a] = first * sin_sh[a] + other * cos_sh[a]
        if spec.divisor == 4:
            for r, a in T.Parallel(R, A):
                done_sh[r, A + a] = T.wide(raw[bb, r, bh // hpg, A + a]) + bias[bh, r, A + a]
                done_sh[r, 3 * A + a] = T.wide(raw[bb, r, bh // hpg, 3 * A + a]) + bias[bh, r, 3 * A + a]

    @T.macro
    def products(v, x, psi, adt, dt, trap, slot, bb, bh, alpha_sh, before_sh, now_sh, x_sh):
        one = T.number(1.0)
        for i in T.Parallel(1):
            alpha_sh[i] = T.exp(adt[bb, bh])
        for r, p in T.Parallel(R, W):
            if p < P:
                share = one / (one + T.exp(-trap[bb, bh]))
                late = (one - share) * dt[bb, bh] * T.exp(adt[bb, bh])
                value = T.wide(v[bb, bh, p]) * psi[bh, r, p]
                x_sh[r, p] = value
                now_sh[r, p] = share * dt[bb, bh] * value
                before_sh[r, p] = late * (T.wide(x[slot, bh, p]) * psi[bh, r, p])
            else:
                x_sh[r, p] = T.zero()
                now_sh[r, p] = T.zero()
                before_sh[r, p] = T.zero()

    @T.macro
    def load(ssm, slot, bh, p0, h):
        for i, n in T.Parallel(rows, N):
            h[i, n] = T.if_then_else(p0 + i < P, ssm[slot, bh, p0 + i, n], T.zero())

    @T.macro
    def advance(ssm, slot, active, bh, p0, alpha_sh, before_sh, now_sh, q_sh, k_sh, k_before_sh, h, y_sh):
        product = T.alloc_fragment((rows, N), T.f32)
        y = T.alloc_fragment((rows,), T.f32)
        for i, n in T.Parallel(rows, N):
            h[i, n] = h[i, n] * alpha_sh[0]
        for r in T.unroll(R):
            for i, n in T.Parallel(rows, N):
                h[i, n] += before_sh[r, p0 + i] * k_before_sh[r, n] + now_sh[r, p0 + i] * k_sh[r, n]
        for i, n in T.Parallel(rows, N):
            if T.And(active, p0 + i < P):
                ssm[slot, bh, p0 + i, n] = h[i, n]
        for r in T.unroll(R):
            for i, n in T.Parallel(rows, N):
                product[i, n] = h[i, n] * q_sh[r, n]
            T.reduce_sum(product, y, dim=1)
            for i in T.Parallel(rows):
                y_sh[r, p0 + i] = y[i]

    @T.macro
    def skip_and_norm(d, norm, x_sh, bh, y_sh):
        if spec.d:
            for r, p in T.Parallel(R, P):
                y_sh[r, p] = y_sh[r, p] + d[bh] * x_sh[r, p]
        if spec.norm:
            square = T.alloc_fragment((R, W), T.f32)
            rms = T.alloc_fragment((R,), T.f32)
            rms_sh = T.alloc_shared((R,), T.f32)
            for r, p in T.Parallel(R, W):
                square[r, p] = T.if_then_else(p < P, y_sh[r, p] * y_sh[r, p], T.zero())
            T.reduce_sum(square, rms, dim=1)
            for r in T.Parallel(R):
                rms_sh[r] = T.rsqrt(rms[r] / T.number(float(P)) + T.number(spec.norm_eps))
            for r, p in T.Parallel(R, P):
                y_sh[r, p] = y_sh[r, p] * rms_sh[r] * norm[bh, p]

    @T.macro
    def finish(z, zeta, phi, active, bb, bh, y_sh, out):
        if spec.z:
            for r, p in T.Parallel(R, P):
                y_sh[r, p] = y_sh[r, p] * T.silu(T.wide(z[bb, bh, p]) * zeta[bh, r, p])
        if spec.out:
            o = T.alloc_fragment((W,), T.f32)
            T.clear(o)
            for r in T.unroll(R):
                for p in T.Parallel(W):
                    if p < P:
                        o[p] += y_sh[r, p] * phi[bh, r, p]
            for p in T.Parallel(W):
                if p < P:
                    out[bb, bh, p] = T.round_bf16(T.if_then_else(active, o[p], T.zero()))
        else:
            for r, p in T.Parallel(R, P):
                out[bb, r, bh, p] = T.round_bf16(T.if_then_else(active, y_sh[r, p], T.zero()))

    @T.prim_func
    def main(
        slots: T.Tensor((B,), T.i32),
        q: T.Tensor((B, R, G, N), T.bf16), k: T.Tensor((B, R, G, N), T.bf16),
        v: T.Tensor((B, H, P), T.bf16), z: T.Tensor(zs, T.bf16),
        adt: T.Tensor((B, H), T.f32), dt: T.Tensor((B, H), T.f32), trap: T.Tensor((B, H), T.f32),
        angles: T.Tensor((B, H, A), T.f32),
        q_bias: T.Tensor((H, R, N), T.f32), k_bias: T.Tensor((H, R, N), T.f32), psi: T.Tensor((H, R, P), T.f32),
        zeta: T.Tensor(zw, T.f32), phi: T.Tensor(ow, T.f32), d: T.Tensor(ds, T.f32), norm: T.Tensor(ns, T.f32),
        angle: T.Tensor((L, H, A), T.f32), ssm: T.Tensor((L, H, P, N), T.f32),
        k_state: T.Tensor((L, R, H, N), T.bf16), x_state: T.Tensor((L, H, P), T.bf16),
        out: T.Tensor(os_, T.bf16),
    ):  # fmt: skip
        with T.Kernel(H, B, threads=128) as (bh, bb):
            angle_sh = T.alloc_shared((A,), T.f32)
            cos_sh = T.alloc_shared((A,), T.f32)
            sin_sh = T.alloc_shared((A,), T.f32)
            q_sh = T.alloc_shared((R, N), T.f32)
            k_sh = T.alloc_shared((R, N), T.f32)
            k_before_sh = T.alloc_shared((R, N), T.f32)
            alpha_sh = T.alloc_shared((1,), T.f32)
            before_sh = T.alloc_shared((R, W), T.f32)
            now_sh = T.alloc_shared((R, W), T.f32)
            x_sh = T.alloc_shared((R, W), T.f32)
            y_sh = T.alloc_shared((R, W), T.f32)
            h = T.alloc_fragment((rows, N), T.f32)

            active = slots[bb] >= 0
            slot = T.max(slots[bb], 0)
            load(ssm, slot, bh, 0, h)  # first of all: it is nearly all the traffic, and nothing waits for it yet
            turn_angle(angles, dt, angle, slot, bb, bh, angle_sh, cos_sh, sin_sh)
            rotate(q, q_bias, cos_sh, sin_sh, q_sh, bb, bh)
            rotate(k, k_bias, cos_sh, sin_sh, k_sh, bb, bh)
            for r, n in T.Parallel(R, N):
                k_before_sh[r, n] = T.wide(k_state[slot, r, bh, n])
            products(v, x_state, psi, adt, dt, trap, slot, bb, bh, alpha_sh, before_sh, now_sh, x_sh)
            # All threads have read the old angle, k and x before any of it is written
            T.sync_threads()
            advance(ssm, slot, active, bh, 0, alpha_sh, before_sh, now_sh, q_sh, k_sh, k_before_sh, h, y_sh)
            for tile in T.serial(1, -(-P // rows)):
                load(ssm, slot, bh, tile * rows, h)
                advance(
                    ssm, slot, active, bh, tile * rows, alpha_sh, before_sh, now_sh, q_sh, k_sh, k_before_sh, h, y_sh
                )
            for a in T.Parallel(A):
                if active:
                    angle[slot, bh, a] = angle_sh[a]
            for r, n in T.Parallel(R, N):
                if active:
                    k_state[slot, r, bh, n] = T.round_bf16(k_sh[r, n])
            for p in T.Parallel(P):
                if active:
                    x_state[slot, bh, p] = v[bb, bh, p]
            skip_and_norm(d, norm, x_sh, bh, y_sh)
            finish(z, zeta, phi, active, bb, bh, y_sh, out)

    return main
