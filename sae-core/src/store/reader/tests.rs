use std::collections::HashMap;
use std::ops::Range;
use std::sync::Mutex;

use safetensors::tensor::TensorView;

use super::*;
use crate::store::{LocalFolder, StoreWriter};

/// Blobs in memory.
#[derive(Default)]
struct Memory(Mutex<HashMap<String, Vec<u8>>>);

impl Storage for Memory {
    fn list(&self) -> Result<Vec<String>, StorageError> {
        Ok(self.0.lock().expect("no panic").keys().cloned().collect())
    }

    fn get(&self, name: &str) -> Result<Blob, StorageError> {
        let found = self.0.lock().expect("no panic").get(name).cloned();
        let missing = || StorageError::Missing { place: "memory".into(), name: name.into() };
        found.map(Blob::Owned).ok_or_else(missing)
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StorageError> {
        self.0.lock().expect("no panic").insert(name.to_owned(), bytes.to_vec());
        Ok(())
    }

    fn delete(&self, name: &str) -> Result<(), StorageError> {
        self.0.lock().expect("no panic").remove(name);
        Ok(())
    }
}

fn columns() -> Vec<Column> {
    vec![Column::new("x", 2), Column::new("y", 1)]
}

/// Rows that know their number in every column.
fn rows(ids: Range<u32>) -> Rows {
    let x = ids.clone().flat_map(|id| [id as f32, -(id as f32)]).collect();
    Rows::new(&columns(), vec![x, ids.map(|id| id as f32).collect()]).expect("whole rows")
}

fn write(storage: &dyn Storage, writer: &str, ids: Range<u32>) {
    let mut writer = StoreWriter::open(storage, writer, columns(), 10).expect("opens");
    writer.write(&rows(ids)).expect("written");
    writer.finish().expect("finished");
}

/// 95 rows of two writers in shards of ten.
fn filled(storage: &dyn Storage) {
    write(storage, "a", 0..42);
    write(storage, "b", 42..95);
}

const ORDER: ReadOrder = ReadOrder { seed: 1, window: 25, n_passes: 2 };

fn open(storage: &Arc<Memory>, order: ReadOrder) -> Result<StoreSource, StoreError> {
    StoreSource::open(storage.clone(), order)
}

fn try_read(source: &mut StoreSource, n: usize) -> Result<Vec<u32>, SourceError> {
    let mut rows = Rows::empty(source.columns());
    source.read(n, &mut rows)?;
    let pairs = rows.column(0).chunks(2).zip(rows.column(1));
    assert!(pairs.into_iter().all(|(x, &y)| x == [y, -y]), "columns were torn apart");
    Ok(rows.column(1).iter().map(|&id| id as u32).collect())
}

fn read(source: &mut StoreSource, n: usize) -> Vec<u32> {
    try_read(source, n).expect("reads")
}

#[test]
fn every_pass_has_every_row_once_in_its_own_order() {
    let storage = Arc::new(Memory::default());
    filled(&*storage);
    for window in [1, 25, 1000] {
        let mut source = open(&storage, ReadOrder { window, ..ORDER }).expect("opens");
        assert_eq!(source.n_rows(), Some(190));
        let all = read(&mut source, 1000);
        let (first, second) = all.split_at(95);
        assert_ne!(first, second);
        for pass in [first, second] {
            let mut sorted = pass.to_vec();
            sorted.sort_unstable();
            assert!(sorted.into_iter().eq(0..95), "window {window}");
        }
        // Windows of three or four shards: a row does not leave its own.
        let ids: std::collections::HashSet<_> = first[..20].iter().map(|id| id / 10).collect();
        assert!(if window == 1000 { ids.len() > 5 } else { ids.len() <= 6 }, "{ids:?}");
    }
}

#[test]
fn every_place_can_be_gone_back_to() {
    let storage = Arc::new(Memory::default());
    filled(&*storage);
    let whole = read(&mut open(&storage, ORDER).expect("opens"), 1000);
    for n in 0..=190 {
        let mut source = open(&storage, ORDER).expect("opens");
        assert_eq!(read(&mut source, n), whole[..n]);
        let mut other = open(&storage, ORDER).expect("opens");
        other.seek(&source.position()).expect("a place");
        assert_eq!(read(&mut other, 1000), whole[n..], "after {n}");
    }
    let beyond = open(&storage, ORDER).expect("opens").seek(&Position::new(2, 1)).unwrap_err();
    assert!(beyond.to_string().ends_with("expected 2 passes of 95 rows"), "{beyond}");
}

#[test]
fn the_order_does_not_depend_on_who_was_done_first_or_where_it_lies() {
    let storage = Arc::new(Memory::default());
    filled(&*storage);
    let folder = tempfile::tempdir().expect("a folder");
    let local = LocalFolder::new(folder.path()).expect("made");
    // The other way round, and one of them at the third attempt.
    write(&local, "b", 42..95);
    for (from, to) in [(0, 15), (10, 29)] {
        let mut writer = StoreWriter::open(&local, "a", columns(), 10).expect("opens");
        assert_eq!(writer.n_rows(), from);
        writer.write(&rows(from as u32..to)).expect("written");
    }
    let error = StoreSource::open(Arc::new(local.clone()), ORDER).err().expect("not done");
    assert_eq!(error.to_string(), "a.manifest.json: its writer is not done after 2 shards");
    write_rest(&local);
    let mut local = StoreSource::open(Arc::new(local), ORDER).expect("opens");
    let mut memory = open(&storage, ORDER).expect("opens");
    assert_eq!(local.fingerprint(), memory.fingerprint());
    assert_eq!(read(&mut local, 1000), read(&mut memory, 1000));
    let other = open(&storage, ReadOrder { seed: 2, ..ORDER }).expect("opens");
    assert_ne!(other.fingerprint(), local.fingerprint());
}

fn write_rest(storage: &dyn Storage) {
    let mut writer = StoreWriter::open(storage, "a", columns(), 10).expect("opens");
    writer.write(&rows(writer.n_rows() as u32..42)).expect("written");
    writer.finish().expect("finished");
}

/// A store of one shard with these tensors, whose manifest says that all is well.
fn forged(tensors: &[(&str, Dtype, Vec<usize>)]) -> Arc<Memory> {
    let storage = Arc::new(Memory::default());
    write(&*storage, "a", 0..2);
    let bytes = [0; 64];
    let views = tensors.iter().map(|(name, dtype, shape)| {
        let n_bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        let view = TensorView::new(*dtype, shape.clone(), &bytes[..n_bytes]);
        (*name, view.expect("a shape of its values"))
    });
    let shard = safetensors::serialize(views, None).expect("views of whole tensors");
    let mut manifest = Manifest::read(&*storage, "a").expect("reads");
    manifest.shards[0].sha256 = sha256([shard.as_slice()]);
    manifest.write(&*storage, "a").expect("written");
    storage.put("a-00000000.safetensors", &shard).expect("written");
    storage
}

#[test]
fn wrong_shards_are_named() {
    use Dtype::{F16, F32};
    let error = |tensors: &[(&str, Dtype, Vec<usize>)]| {
        let mut source = open(&forged(tensors), ORDER).expect("opens");
        try_read(&mut source, 1).unwrap_err().to_string()
    };
    let shard = "shard a-00000000.safetensors";
    assert_eq!(
        error(&[("x", F32, vec![2, 3]), ("y", F32, vec![2, 1])]),
        format!("{shard}: column x has shape [2, 3], expected [2, 2]")
    );
    assert_eq!(
        error(&[("x", F32, vec![2, 2]), ("y", F16, vec![2, 1])]),
        format!("{shard}: column y is stored as F16, expected F32")
    );
    assert_eq!(
        error(&[("x", F32, vec![2, 2])]),
        format!("{shard}: tensors [\"x\"], expected [\"x\", \"y\"]")
    );
    assert_eq!(
        error(&[("x", F32, vec![1, 2]), ("y", F32, vec![2, 1])]),
        format!("{shard}: column x has shape [1, 2], expected [2, 2]")
    );
}

#[test]
fn damaged_and_missing_shards_are_named() {
    let storage = Arc::new(Memory::default());
    filled(&*storage);
    let shard = "b-00000003.safetensors";
    let whole = storage.get(shard).expect("there").to_vec();
    let error = || {
        let mut source = open(&storage, ORDER).expect("opens");
        match try_read(&mut source, 1000).unwrap_err() {
            SourceError::Store(error) => error,
            error => panic!("{error}"),
        }
    };
    for n in 0..whole.len() {
        storage.put(shard, &whole[..n]).expect("written");
        assert!(matches!(error(), StoreError::Hash { shard: name, .. } if name == shard));
        let mut flipped = whole.clone();
        flipped[n] ^= 1 << (n % 8);
        storage.put(shard, &flipped).expect("written");
        assert!(matches!(error(), StoreError::Hash { shard: name, .. } if name == shard));
    }
    storage.delete(shard).expect("removed");
    assert!(matches!(error(), StoreError::MissingShard { shard: name } if name == shard));
}

#[test]
fn damaged_manifests_are_refused() {
    let storage = Arc::new(Memory::default());
    assert!(matches!(open(&storage, ORDER), Err(StoreError::Empty)));
    filled(&*storage);
    let manifest = "a.manifest.json";
    let whole = storage.get(manifest).expect("there").to_vec();
    let text = String::from_utf8(whole.clone()).expect("JSON");
    for n in 0..whole.len() {
        storage.put(manifest, &whole[..n]).expect("written");
        assert!(matches!(open(&storage, ORDER), Err(StoreError::Manifest { .. })), "{n} bytes");
    }
    for (from, to, key) in [
        ("\"version\": 1", "\"version\": 2", "version"),
        ("F32", "F64", "dtype"),
        ("\"width\": 2", "\"width\": 0", "width"),
        ("\"y\"", "\"x\"", "columns"),
        ("\"n_rows\": 2", "\"n_rows\": 18446744073709551615", "n_rows"),
    ] {
        assert!(text.contains(from), "{from}");
        storage.put(manifest, text.replace(from, to).as_bytes()).expect("written");
        match open(&storage, ORDER) {
            Err(StoreError::ManifestValue { key: actual, .. }) => assert_eq!(actual, key),
            other => panic!("{from}: {:?}", other.err()),
        }
    }
    storage.put(manifest, text.replace("\"y\"", "\"z\"").as_bytes()).expect("written");
    assert!(matches!(open(&storage, ORDER), Err(StoreError::Columns { .. })));
    // Rows that are not there are believed until their shard is opened, and cost nothing.
    storage
        .put(manifest, text.replace("\"n_rows\": 2", "\"n_rows\": 4000000000").as_bytes())
        .expect("written");
    let mut source = open(&storage, ReadOrder { window: 1 << 40, ..ORDER }).expect("opens");
    assert!(matches!(
        try_read(&mut source, 1).unwrap_err(),
        SourceError::Store(StoreError::Shape { .. })
    ));
}

#[test]
fn writers_are_checked() {
    let storage = Memory::default();
    let open = |name: &str, columns, rows| StoreWriter::open(&storage, name, columns, rows).err();
    for name in ["", "a.b", "../a", "a b"] {
        assert!(matches!(open(name, columns(), 10), Some(StoreError::Writer { .. })), "{name}");
    }
    assert!(matches!(open("a", columns(), 0), Some(StoreError::Option { .. })));
    write(&storage, "a", 0..5);
    assert!(matches!(open("a", columns(), 10), Some(StoreError::Finished { .. })));
    let mut writer = StoreWriter::open(&storage, "b", columns(), 10).expect("opens");
    let narrow = Rows::new(&[Column::new("x", 1)], vec![vec![0.0]]).expect("a row");
    assert!(matches!(writer.write(&narrow), Err(StoreError::Rows { .. })));
    drop(writer);
    let other = vec![Column::new("x", 1)];
    assert!(matches!(open("b", other, 10), Some(StoreError::Columns { .. })));
}
