use std::time::Instant;
use model_hooks::*;
use burn::tensor::*;
fn time(name: &str, n: usize, mut f: impl FnMut()) { f(); let mut best = f64::MAX; for _ in 0..3 { let t = Instant::now(); f(); best = best.min(t.elapsed().as_secs_f64()); } println!("{name}: {:.1} ms, {:.0} /s", best*1e3, n as f64/best); }
fn main() {
    examples::allocator::keep_pages();
    let dev = Device::flex();
    let t = Instant::now();
    let l = examples::assets::load_model(None, &dev).unwrap();
    println!("load {:?}", t.elapsed());
    let m = &l.model;
    for (a,b,c) in [(1024usize,576usize,1536usize),(1024,1536,576),(1024,576,576),(1024,576,192),(40,576,1536),(40,576,49152),(1,576,1536),(1,576,49152)] {
        let x = Tensor::<2>::ones([a,b], &dev); let w = Tensor::<2>::ones([b,c], &dev);
        let t = Instant::now(); let mut k = 0; while t.elapsed().as_secs_f64() < 0.3 { let _ = x.clone().matmul(w.clone()); k += 1; }
        let s = t.elapsed().as_secs_f64()/k as f64; println!("gemm {a}x{b}x{c}: {:.2} ms {:.0} GFLOP/s", s*1e3, 2e-9*(a*b*c) as f64/s);
    }
    let rows: Vec<Vec<u32>> = (0..8).map(|r| (0..128).map(|i| (i*37+r*11+5) as u32 % 40000).collect()).collect();
    let tok = TokenBatch::new(&rows, m.config(), &dev).unwrap();
    time("embed..13 blocks [8,128]", 1024, || { let _ = m.run_until(&tok, 13, &mut ()).unwrap(); });
    time("full last logits", 1024, || { let _ = m.last_logits(&tok, &mut ()).unwrap(); });
    time("full logits", 1024, || { let _ = m.logits(&tok, &mut ()).unwrap(); });
    for n in [1, 40, 80] {
        let prompts: Vec<Vec<u32>> = (0..n).map(|r| (0..24).map(|i| (i*31+r*7+9) as u32 % 40000).collect()).collect();
        let cfg = GenerateConfig { max_new_tokens: 1, min_new_tokens: 0, stop_ids: vec![] };
        time(&format!("prefill batch {n}x24"), n*24, || { let _ = m.generate(&prompts, &SharedPrefix::default(), &cfg, &mut (), |_| ()).unwrap(); });
        let cfg = GenerateConfig { max_new_tokens: 17, min_new_tokens: 0, stop_ids: vec![] };
        time(&format!("prefill+16 decode batch {n}"), n*16, || { let _ = m.generate(&prompts, &SharedPrefix::default(), &cfg, &mut (), |_| ()).unwrap(); });
    }
    let x = Tensor::<2>::ones([1024,1536], &dev);
    time("silu_mul", 1, || { let _ = kernels::silu_mul(x.clone(), x.clone()); });
    let q = Tensor::<4>::ones([8,128,9,64], &dev); let kv = Tensor::<4>::ones([8,128,3,64], &dev);
    time("attention", 1, || { let _ = kernels::attention(q.clone(), kernels::KeyValues{prefix:None, own:(kv.clone(), kv.clone())}, Tensor::<1,Int>::zeros([8], &dev), 0.125); });
    let x = Tensor::<2>::ones([1024,576], &dev); let g = Tensor::<1>::ones([576], &dev);
    time("rms_norm", 1, || { let _ = kernels::rms_norm(x.clone(), g.clone(), 1e-5); });
    time("add", 1, || { let _ = x.clone() + x.clone(); });
    let cs = Tensor::<3>::ones([8,128,32], &dev);
    time("rotary", 1, || { let _ = kernels::rotary(q.clone(), cs.clone(), cs.clone()); });
}
