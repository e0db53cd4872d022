//! x
use std::time::Instant;
use model_hooks::*;
use burn::tensor::*;
fn time(name: &str, n: usize, mut f: impl FnMut()) { f(); let mut best = f64::MAX; for _ in 0..5 { let t = Instant::now(); f(); best = best.min(t.elapsed().as_secs_f64()); } println!("{name}: {:.2} ms, {:.0} /s", best*1e3, n as f64/best); }
fn main() {
    examples::allocator::keep_pages();
    let dev = Device::flex();
    let l = examples::assets::load_model(None, &dev).unwrap();
    let m = &l.model;
    for n in [1, 8, 40] {
    let x = Tensor::<2>::ones([n,576], &dev); let w = Tensor::<2>::ones([49152,576], &dev);
    time(&format!("dot_rows {n}"), n, || { let _ = kernels::dot_rows(x.clone(), w.clone()); });
    time(&format!("gemm T {n}"), n, || { let _ = x.clone().matmul(w.clone().transpose()); });
    }
    let x = Tensor::<2>::ones([40,576], &dev); let w = Tensor::<2>::ones([576,1536], &dev); let w2 = Tensor::<2>::ones([1536,576], &dev); let ws = Tensor::<2>::ones([576,576], &dev); let wk = Tensor::<2>::ones([576,192], &dev);
    time("gemm 40x576x1536", 1, || { let _ = x.clone().matmul(w.clone()); });
    let y = Tensor::<2>::ones([40,1536], &dev);
    time("gemm 40x1536x576", 1, || { let _ = y.clone().matmul(w2.clone()); });
    time("gemm 40x576x576", 1, || { let _ = x.clone().matmul(ws.clone()); });
    time("gemm 40x576x192", 1, || { let _ = x.clone().matmul(wk.clone()); });
    let q = Tensor::<4>::ones([40,1,9,64], &dev); let kv = Tensor::<4>::ones([40,40,3,64], &dev);
    time("attention decode 40x40", 1, || { let _ = kernels::attention(q.clone(), kernels::KeyValues{prefix:None, own:(kv.clone(), kv.clone())}, Tensor::<1,Int>::zeros([40], &dev), 0.125); });
    let k1 = Tensor::<4>::ones([40,1,3,64], &dev);
    time("cat", 1, || { let _ = Tensor::cat(vec![kv.clone(), k1.clone()], 1); });
    let cs = Tensor::<3>::ones([40,1,32], &dev);
    time("rotary", 1, || { let _ = kernels::rotary(q.clone(), cs.clone(), cs.clone()); });
    let g = Tensor::<1>::ones([576], &dev);
    time("rms_norm", 1, || { let _ = kernels::rms_norm(x.clone(), g.clone(), 1e-5); });
    time("silu", 1, || { let _ = kernels::silu_mul(y.clone(), y.clone()); });
    time("add", 1, || { let _ = x.clone() + x.clone(); });
    let rows: Vec<Vec<u32>> = (0..8).map(|r| (0..128).map(|i| (i*37+r*11+5) as u32 % 40000).collect()).collect();
    let tok = TokenBatch::new(&rows, m.config(), &dev).unwrap();
    time("embed..13 blocks [8,128]", 1024, || { let _ = m.run_until(&tok, 13, &mut ()).unwrap(); });
    time("30 blocks", 1024, || { let _ = m.run_until(&tok, 30, &mut ()).unwrap(); });
    time("full last logits", 1024, || { let _ = m.last_logits(&tok, &mut ()).unwrap(); });
    for n in [40] {
        let prompts: Vec<Vec<u32>> = (0..n).map(|r| (0..24).map(|i| (i*31+r*7+9) as u32 % 40000).collect()).collect();
        let cfg = GenerateConfig { max_new_tokens: 17, min_new_tokens: 0, stop_ids: vec![] };
        let t = Instant::now();
        let mut last = t.elapsed().as_secs_f64();
        let _ = m.generate(&prompts, &SharedPrefix::default(), &cfg, &mut (), |_| { let now = t.elapsed().as_secs_f64(); println!("step {:.1}", 1e3*(now-last)); last = now; }).unwrap();
    }
}
