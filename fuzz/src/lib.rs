//! What the fuzz targets do: what the tests of hostile files do, with files that libFuzzer makes.

#[path = "../../model-hooks/tests/hostile/readers.rs"]
mod models;
#[allow(dead_code, reason = "what only the tests use of it")]
#[path = "../../sae-core/tests/hostile/readers.rs"]
mod saes;

/// Reads a file with the reader of this name, and uses the result. A panic is a find.
///
/// # Panics
/// If there is no such reader.
pub fn read_and_use(name: &str, file: &[u8]) {
    let models = models::READERS.iter().map(|reader| (reader.name, reader.read));
    let saes = saes::READERS.iter().map(|reader| (reader.name, reader.read));
    let (_, read) = models.chain(saes).find(|reader| reader.0 == name).expect("a reader");
    if let Ok(use_it) = read(file) {
        use_it();
    }
}
