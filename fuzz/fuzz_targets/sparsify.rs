#![no_main]

libfuzzer_sys::fuzz_target!(|file: &[u8]| fuzz::read_and_use("sparsify", file));
