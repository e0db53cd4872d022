//! Blobs in an object store.

use std::sync::Arc;

use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use tokio::runtime::{Builder, Runtime};

use super::error::StorageError;
use super::storage::{Blob, Storage, check_name};

/// A place in an object store: S3, and whatever else the `object_store` crate has.
///
/// Its calls block. They run on threads of their own, so they may be made from anywhere, also from
/// within somebody's async runtime.
#[derive(Debug)]
pub struct ObjectStorage {
    store: Arc<dyn ObjectStore>,
    folder: Path,
    runtime: Runtime,
}

impl ObjectStorage {
    /// The objects directly below this path.
    ///
    /// # Errors
    /// If the system has no threads left to wait on.
    pub fn new(store: Arc<dyn ObjectStore>, folder: Path) -> Result<Self, StorageError> {
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|source| StorageError::Io {
            place: store.to_string(),
            name: ".".to_owned(),
            action: "reached",
            source,
        })?;
        Ok(Self { store, folder, runtime })
    }

    fn wait<T: Send>(
        &self,
        name: &str,
        action: &'static str,
        call: impl Future<Output = object_store::Result<T>> + Send,
    ) -> Result<T, StorageError> {
        // A runtime may not be entered from within another one.
        let result = std::thread::scope(|scope| {
            scope.spawn(|| self.runtime.block_on(call)).join().expect("object_store has panicked")
        });
        result.map_err(|error| {
            let (place, name) = (format!("{}/{}", self.store, self.folder), name.to_owned());
            match error {
                object_store::Error::NotFound { .. } => StorageError::Missing { place, name },
                error => {
                    let source = std::io::Error::other(error);
                    StorageError::Io { place, name, action, source }
                }
            }
        })
    }

    fn path(&self, name: &str) -> Result<Path, StorageError> {
        check_name(name)?;
        Ok(self.folder.clone().join(name))
    }
}

impl Storage for ObjectStorage {
    fn list(&self) -> Result<Vec<String>, StorageError> {
        let call = self.store.list_with_delimiter(Some(&self.folder));
        let objects = self.wait(".", "listed", call)?.objects;
        let names = objects.iter().filter_map(|object| object.location.filename());
        Ok(names.filter(|name| check_name(name).is_ok()).map(str::to_owned).collect())
    }

    fn get(&self, name: &str) -> Result<Blob, StorageError> {
        let path = self.path(name)?;
        let call = async { self.store.get(&path).await?.bytes().await };
        Ok(Blob::Owned(self.wait(name, "read", call)?.to_vec()))
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StorageError> {
        let path = self.path(name)?;
        let payload = PutPayload::from(bytes.to_vec());
        self.wait(name, "written", self.store.put(&path, payload)).map(drop)
    }

    fn delete(&self, name: &str) -> Result<(), StorageError> {
        let path = self.path(name)?;
        self.wait(name, "removed", self.store.delete(&path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::memory::InMemory;

    #[test]
    fn blobs_are_written_read_and_removed() {
        let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let at =
            |folder: &str| ObjectStorage::new(store.clone(), Path::from(folder)).expect("made");
        let (storage, other) = (at("runs/a"), at("runs"));
        storage.put("x", b"one").expect("written");
        storage.put("x", b"two").expect("replaced");
        other.put("y", b"").expect("written");
        assert_eq!(&storage.get("x").expect("read")[..], b"two");
        assert_eq!(storage.list().expect("listed"), ["x"]);
        // What lies deeper is another folder's.
        assert_eq!(other.list().expect("listed"), ["y"]);
        storage.delete("x").expect("removed");
        assert!(matches!(storage.get("x"), Err(StorageError::Missing { .. })));
        assert!(matches!(storage.put("../x", b""), Err(StorageError::Name { .. })));
    }

    #[test]
    fn calls_may_come_from_within_a_runtime() {
        let storage = ObjectStorage::new(Arc::new(InMemory::new()), Path::from("")).expect("made");
        let runtime = Builder::new_current_thread().build().expect("made");
        runtime.block_on(async { storage.put("x", b"one").expect("written") });
        assert_eq!(storage.list().expect("listed"), ["x"]);
    }
}
