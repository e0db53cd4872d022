//! Fetches models from the Hugging Face hub into its cache, shared with the Python libraries.
//!
//! What is in the cache is not asked for again. This module is the only one of the libraries that
//! reaches the network.

use std::env;
use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::path::{Component, Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo};

use super::folder::{
    CHAT_TEMPLATE, CONFIG, GENERATION_CONFIG, INDEX, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS,
};
use super::{LoadError, ShardIndex};

/// How long the hub may take to accept a connection. hf-hub itself would wait for minutes.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Fetches a model and returns the path to give to [`load::open`](super::open): the folder of
/// `owner/name`, or the file of `owner/name:file.gguf`.
///
/// # Errors
/// [`LoadError`] if the name is malformed, the hub cannot be reached, or it has no such model.
pub fn fetch(spec: &str) -> Result<PathBuf, LoadError> {
    match spec.split_once(':') {
        Some((repo, file)) => fetch_file(repo, file),
        None => fetch_folder(spec),
    }
}

/// Fetches one file of a repository; `file` may lie in a folder of it.
///
/// # Errors
/// As [`fetch`].
pub fn fetch_file(repo: &str, file: &str) -> Result<PathBuf, LoadError> {
    let hub = HubRepo::new(repo)?;
    let is_inside = Path::new(file).components().all(|part| matches!(part, Component::Normal(_)));
    if file.is_empty() || !is_inside || file.contains(['\\', '\0', '?', '#', '%']) {
        return Err(LoadError::HubName { actual: format!("{repo}:{file}") });
    }
    match hub.cached(file) {
        Some(path) => Ok(path),
        None => hub.download(&hub.connect()?, file),
    }
}

fn fetch_folder(repo: &str) -> Result<PathBuf, LoadError> {
    let hub = HubRepo::new(repo)?;
    if let Some(folder) = hub.complete_folder()? {
        return Ok(folder);
    }
    let remote = hub.connect()?;
    let listing = remote.info().map_err(|source| hub.failed("the list of files", source))?;
    let has = |name: &str| listing.siblings.iter().any(|sibling| sibling.rfilename == name);
    for file in [GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE] {
        if has(file) {
            hub.download(&remote, file)?;
        }
    }
    if has(WEIGHTS) {
        hub.download(&remote, WEIGHTS)?;
    } else {
        let index = ShardIndex::open(&hub.download(&remote, INDEX)?)?;
        for shard in index.shards() {
            hub.download(&remote, shard)?;
        }
    }
    Ok(parent(hub.download(&remote, CONFIG)?))
}

/// A repository of models, on the hub and in the cache.
struct HubRepo<'a> {
    name: &'a str,
    cache: CacheRepo,
}

impl<'a> HubRepo<'a> {
    fn new(name: &'a str) -> Result<Self, LoadError> {
        // The name becomes a part of an address and of a path.
        let is_word = |word: &str| {
            let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            !word.is_empty() && word.chars().all(is_allowed) && !word.starts_with('.')
        };
        let is_name = match name.split_once('/') {
            Some((owner, model)) => is_word(owner) && is_word(model),
            None => is_word(name),
        };
        // hf-hub panics where it finds no place for its cache.
        if !is_name || (env::var_os("HF_HOME").is_none() && env::home_dir().is_none()) {
            return Err(LoadError::HubName { actual: name.to_owned() });
        }
        let cache = Cache::from_env().repo(Repo::model(name.to_owned()));
        Ok(Self { name, cache })
    }

    fn cached(&self, file: &str) -> Option<PathBuf> {
        self.cache.get(file)
    }

    /// The cached folder, if it has all that makes a model with a tokenizer.
    fn complete_folder(&self) -> Result<Option<PathBuf>, LoadError> {
        let has_all = |files: &[&str]| files.iter().all(|file| self.cached(file).is_some());
        if !has_all(&[TOKENIZER, TOKENIZER_CONFIG]) {
            return Ok(None);
        }
        let has_weights = match self.cached(INDEX) {
            _ if has_all(&[WEIGHTS]) => true,
            Some(index) => {
                let index = ShardIndex::open(&index)?;
                index.shards().into_iter().all(|shard| self.cached(shard).is_some())
            }
            None => false,
        };
        Ok(self.cached(CONFIG).filter(|_| has_weights).map(parent))
    }

    fn connect(&self) -> Result<ApiRepo, LoadError> {
        let endpoint = env::var("HF_ENDPOINT").unwrap_or_else(|_| DEFAULT_ENDPOINT.to_owned());
        probe(&endpoint)?;
        let mut builder = ApiBuilder::from_env().with_progress(false);
        if let Ok(token) = env::var("HF_TOKEN") {
            builder = builder.with_token(Some(token));
        }
        let api: Api = builder.build().map_err(|source| self.failed("anything", source))?;
        Ok(api.model(self.name.to_owned()))
    }

    fn download(&self, remote: &ApiRepo, file: &str) -> Result<PathBuf, LoadError> {
        remote.get(file).map_err(|source| self.failed(file, source))
    }

    fn failed(&self, file: &str, source: ApiError) -> LoadError {
        let (repo, file) = (self.name.to_owned(), file.to_owned());
        LoadError::HubRequest { repo, file, source: Box::new(source) }
    }
}

fn parent(file: PathBuf) -> PathBuf {
    file.parent().map_or_else(PathBuf::new, Path::to_path_buf)
}

/// Checks that something answers at `endpoint`, or at the proxy that the environment sets.
fn probe(endpoint: &str) -> Result<(), LoadError> {
    let proxy =
        ["ALL_PROXY", "all_proxy", "HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"]
            .into_iter()
            .find_map(|name| env::var(name).ok().filter(|proxy| !proxy.is_empty()));
    let address = proxy.unwrap_or_else(|| endpoint.to_owned());
    let unreachable = |source| LoadError::HubUnreachable {
        endpoint: address.clone(),
        seconds: CONNECT_TIMEOUT.as_secs(),
        source,
    };
    let Some((host, port)) = host_and_port(&address) else {
        let source = io::Error::new(io::ErrorKind::InvalidInput, "not an address with a host");
        return Err(unreachable(source));
    };
    // On a thread of its own, because looking up a name has no time limit at all.
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(connect((host.as_str(), port))));
    match receiver.recv_timeout(CONNECT_TIMEOUT) {
        Ok(connected) => connected.map_err(unreachable),
        Err(_) => Err(unreachable(io::ErrorKind::TimedOut.into())),
    }
}

fn connect(host: (&str, u16)) -> io::Result<()> {
    let mut failure = io::ErrorKind::NotFound.into();
    for address in host.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
            Ok(_) => return Ok(()),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// The host and port of `scheme://user@host:port/path`.
fn host_and_port(address: &str) -> Option<(String, u16)> {
    let (scheme, rest) = address.split_once("://").unwrap_or(("http", address));
    let authority = rest.split(['/', '?', '#']).next()?;
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let default_port = if scheme == "https" { 443 } else { 80 };
    let (host, port) = match host.rsplit_once(':') {
        // A colon inside the brackets of an IPv6 address begins no port.
        Some((host, port)) if !port.ends_with(']') => (host, port.parse().ok()?),
        _ => (host, default_port),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    (!host.is_empty()).then(|| (host.to_owned(), port))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn finds_the_host_of_an_address() {
        for (address, expected) in [
            ("https://huggingface.co", Some(("huggingface.co", 443))),
            ("https://user:secret@mirror.example:8443/hf?x=1", Some(("mirror.example", 8443))),
            ("http://[::1]:3128", Some(("::1", 3128))),
            ("http://[::1]/", Some(("::1", 80))),
            ("proxy:8080", Some(("proxy", 8080))),
            ("https://", None),
            ("https://host:port", None),
        ] {
            let expected = expected.map(|(host, port)| (host.to_owned(), port));
            assert_eq!(host_and_port(address), expected, "{address}");
        }
    }

    #[test]
    fn a_probe_tells_an_open_port_from_a_closed_one() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        connect(("127.0.0.1", port)).unwrap();
        drop(listener);
        connect(("127.0.0.1", port)).unwrap_err();
    }

    #[test]
    fn names_that_would_leave_the_hub_are_refused() {
        for repo in ["", "/", "a/", "../b", "a/..", "a/b/c", "a b", "a/b?x", "/etc/passwd"] {
            assert!(matches!(fetch(repo), Err(LoadError::HubName { .. })), "{repo}");
        }
        for file in ["", "/etc/passwd", "../x.gguf", "a/../../x", "a\\b", "a?b"] {
            let fetched = fetch_file("owner/name", file);
            assert!(matches!(fetched, Err(LoadError::HubName { .. })), "{file}");
        }
    }
}
