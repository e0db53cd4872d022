use burn::tensor::{Device, Distribution, Tensor};
use std::time::Instant;
fn main() {
    examples::allocator::keep_pages();
    let d = Device::flex();
    let noise = |s: [usize; 2]| Tensor::<2>::random(s, Distribution::Default, &d);
    for n in [1usize, 4, 8, 16, 32, 64, 128, 1024] {
        for [i, o] in [[576, 576], [576, 192], [576, 1536], [1536, 576], [576, 49152]] {
            if n == 1024 && o > 2000 {
                continue;
            }
            let x = noise([n, i]);
            let w = noise([i, o]);
            let wt = noise([o, i]);
            let run = |f: &dyn Fn() -> Tensor<2>| {
                let mut t = vec![];
                for _ in 0..30 {
                    let s = Instant::now();
                    std::hint::black_box(f());
                    t.push(s.elapsed().as_secs_f64());
                }
                t.sort_by(f64::total_cmp);
                t[t.len() / 2]
            };
            let a = run(&|| x.clone().matmul(w.clone()));
            let b = run(&|| x.clone().matmul(wt.clone().transpose()));
            let c = run(&|| kernels::dot_rows(x.clone(), wt.clone()));
            let fl = 2.0 * (n * i * o) as f64;
            println!(
                "n {n} [{i},{o}]  plain {:.1} us {:.1} GF  transposed {:.1} us {:.1} GF  dot_rows {:.1} us {:.1} GF  {:.1} GB/s",
                a * 1e6,
                fl / a / 1e9,
                b * 1e6,
                fl / b / 1e9,
                c * 1e6,
                fl / c / 1e9,
                (i * o * 4) as f64 / c / 1e9
            );
        }
    }
}
