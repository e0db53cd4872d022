//! What the fuzz targets do: what the tests of hostile files do, with files that libFuzzer makes.

#[path = "../../model-hooks/tests/hostile/readers.rs"]
mod readers;

/// Reads a file with the reader of this name, and uses the result. A panic is a find.
///
/// # Panics
/// If there is no such reader.
pub fn read_and_use(name: &str, file: &[u8]) {
    let reader = readers::READERS.iter().find(|reader| reader.name == name).expect("a reader");
    if let Ok(use_it) = (reader.read)(file) {
        use_it();
    }
}
