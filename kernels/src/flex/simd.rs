//! Inner loops, compiled three times and chosen at run time by what the processor has.
//!
//! The loops are plain Rust over slices: LLVM vectorises them once the target features allow it.
//! `f32::mul_add` is a library call without FMA, so every loop that uses it must be reached through
//! [`multiversion!`].

/// Defines a function whose body is compiled for AVX-512, for AVX2 + FMA, and as it is.
macro_rules! multiversion {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
                fn v4($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                fn v3($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }

                if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
                    // SAFETY: the processor has the features that `v4` is compiled for.
                    return unsafe { v4($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    // SAFETY: the processor has the features that `v3` is compiled for.
                    return unsafe { v3($($arg),*) };
                }
            }
            body($($arg),*)
        }
    };
}
pub(super) use multiversion;

/// Accumulators of a reduction: enough independent chains to hide the latency of an FMA.
const LANES: usize = 32;

/// `out += a · x`.
#[inline(always)]
pub(super) fn add_scaled(out: &mut [f32], a: f32, x: &[f32]) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out = a.mul_add(x, *out);
    }
}

multiversion! {
    /// `out += x`.
    pub(super) fn add(out: &mut [f32], x: &[f32]) {
        add_scaled(out, 1.0, x);
    }
}

/// `out += Σ a[i] · x[i]`: four at a time need a quarter of the loads and stores of `out`.
#[inline(always)]
pub(super) fn add_scaled_4(out: &mut [f32], a: [f32; 4], x: [&[f32]; 4]) {
    let n = out.len();
    let [x0, x1, x2, x3] = x.map(|x| &x[..n]);
    for i in 0..n {
        let two = a[1].mul_add(x1[i], a[0].mul_add(x0[i], out[i]));
        out[i] = a[3].mul_add(x3[i], a[2].mul_add(x2[i], two));
    }
}

/// The sum, in lanes.
#[inline(always)]
pub(super) fn sum(x: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let tail: f32 = chunks.remainder().iter().sum();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += x;
        }
    }
    lanes.iter().sum::<f32>() + tail
}

/// `⟨x, y⟩`, summed in lanes, so that the order does not depend on the processor.
#[inline(always)]
pub(super) fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (x_chunks, y_chunks) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let tail = x_chunks.remainder().iter().zip(y_chunks.remainder());
    let tail: f32 = tail.map(|(x, y)| x * y).sum();
    for (x, y) in x_chunks.zip(y_chunks) {
        for lane in 0..LANES {
            lanes[lane] = x[lane].mul_add(y[lane], lanes[lane]);
        }
    }
    lanes.iter().sum::<f32>() + tail
}

/// `⟨x[i], y⟩` for four vectors, which load `y` once.
#[inline(always)]
pub(super) fn dot_4(x: [&[f32]; 4], y: &[f32]) -> [f32; 4] {
    const LANES: usize = 16;
    let n = y.len();
    let [x0, x1, x2, x3] = x.map(|x| &x[..n]);
    let (mut a, mut b, mut c, mut d) = ([0f32; LANES], [0f32; LANES], [0f32; LANES], [0f32; LANES]);
    let end = n / LANES * LANES;
    for i in (0..end).step_by(LANES) {
        let y = &y[i..i + LANES];
        let (x0, x1) = (&x0[i..i + LANES], &x1[i..i + LANES]);
        let (x2, x3) = (&x2[i..i + LANES], &x3[i..i + LANES]);
        for lane in 0..LANES {
            a[lane] = x0[lane].mul_add(y[lane], a[lane]);
            b[lane] = x1[lane].mul_add(y[lane], b[lane]);
            c[lane] = x2[lane].mul_add(y[lane], c[lane]);
            d[lane] = x3[lane].mul_add(y[lane], d[lane]);
        }
    }
    let tail = |x: &[f32]| x[end..].iter().zip(&y[end..]).map(|(x, y)| x * y).sum::<f32>();
    let total = |lanes: [f32; LANES], x| lanes.iter().sum::<f32>() + tail(x);
    [total(a, x0), total(b, x1), total(c, x2), total(d, x3)]
}

/// The largest element, or −∞.
#[inline(always)]
pub(super) fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let tail = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    lanes.iter().copied().fold(tail, f32::max)
}

/// `eˣ` to about one unit in the last place, without branches, so that loops over it vectorise.
///
/// Range reduction by ln 2 in two parts and a polynomial of degree 6 (Cephes' `expf`); arguments
/// are clamped to ±87, where the result is still a normal number.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding 1.5 · 2²³ rounds to an integer, left in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 87.0);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    let p = 1.987_569_2e-4f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 5e-1);
    let p = p.mul_add(r * r, r + 1.0);
    let power = (shifted.to_bits().wrapping_add(127)) << 23;
    p * f32::from_bits(power)
}

/// `tanh x`, to a few units in the last place of 1.
#[inline(always)]
pub(super) fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(2.0 * x) + 1.0)
}

/// The error function to 1.5e-7 (Abramowitz & Stegun, 7.1.26).
#[inline(always)]
pub(super) fn erf(x: f32) -> f32 {
    let a = x.abs();
    let t = 1.0 / 0.327_591_1f32.mul_add(a, 1.0);
    let p = 1.061_405_4f32;
    let p = p.mul_add(t, -1.453_152);
    let p = p.mul_add(t, 1.421_413_7);
    let p = p.mul_add(t, -0.284_496_74);
    let p = p.mul_add(t, 0.254_829_6);
    (1.0 - p * t * exp(-a * a)).copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_over_its_range() {
        let worst = (-8700..=8700)
            .map(|i| i as f32 / 100.0)
            .map(|x| (exp(x) as f64 / (x as f64).exp() - 1.0).abs())
            .fold(0.0, f64::max);
        assert!(worst < 3e-7, "{worst:e}");
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn dot_and_max_cover_tails() {
        for n in [0, 1, 31, 32, 33, 100] {
            let x: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let expected: f32 = x.iter().map(|x| x * x).sum();
            assert_eq!(dot(&x, &x), expected);
            let expected = x.last().copied().unwrap_or(f32::NEG_INFINITY);
            assert_eq!(max(&x), expected);
        }
    }
}
