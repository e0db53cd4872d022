//! A real browser, spoken to by its DevTools protocol over a pipe.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long the browser has for everything that a test asks of it.
const PATIENCE: Duration = Duration::from_secs(240);

/// A headless Chromium with one tab.
pub struct Browser {
    child: Child,
    requests: ChildStdin,
    replies: BufReader<ChildStdout>,
    session: Option<String>,
    n_requests: u64,
    /// What pages complained about in the console.
    pub complaints: Vec<String>,
    /// Dropped, it tells the watchdog that all is well.
    _well: Sender<()>,
    _profile: tempfile::TempDir,
}

/// The browser of this machine: `$CHROMIUM`, or what is found under the usual names.
fn program() -> String {
    let named = std::env::var("CHROMIUM").ok();
    let names = ["chromium", "chromium-browser", "google-chrome"].map(str::to_owned);
    let runs = |name: &String| {
        let version = Command::new(name).arg("--version").stderr(Stdio::null()).output();
        version.is_ok_and(|output| output.status.success())
    };
    named.into_iter().chain(names).find(runs).expect(
        "a browser: install chromium, name one in CHROMIUM, or set SKIP_BROWSER=1 to do without",
    )
}

impl Browser {
    /// Starts it, with an empty tab.
    pub fn start() -> Self {
        let profile = tempfile::tempdir().unwrap();
        // The browser reads requests from its descriptor 3, and writes replies to 4.
        let mut child = Command::new("sh")
            .args(["-c", r#"exec "$0" "$@" 3<&0 4>&1 0</dev/null 1>&2"#])
            .arg(program())
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"])
            .args(["--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("a shell");
        let requests = child.stdin.take().unwrap();
        let replies = BufReader::new(child.stdout.take().unwrap());
        let (well, watched) = channel::<()>();
        let id = child.id();
        spawn(move || {
            // A browser that hangs would hang the test: reading from it has no time limit.
            if watched.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                let _ = Command::new("kill").args(["-9", &id.to_string()]).status();
            }
        });
        let mut browser = Self {
            child,
            requests,
            replies,
            session: None,
            n_requests: 0,
            complaints: Vec::new(),
            _well: well,
            _profile: profile,
        };
        let tab = browser.ask("Target.createTarget", json!({"url": "about:blank"}));
        let tab = json!({"targetId": tab["targetId"], "flatten": true});
        let session = browser.ask("Target.attachToTarget", tab);
        browser.session = session["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Log"] {
            browser.ask(&format!("{domain}.enable"), json!({}));
        }
        browser
    }

    /// Asks, and waits for the reply; what pages complain about meanwhile is kept.
    fn ask(&mut self, method: &str, params: Value) -> Value {
        self.n_requests += 1;
        let id = self.n_requests;
        let mut request = json!({"id": id, "method": method, "params": params});
        if let Some(session) = &self.session {
            request["sessionId"] = json!(session);
        }
        self.requests.write_all(format!("{request}\0").as_bytes()).expect("it listens");
        self.requests.flush().expect("it listens");
        loop {
            let mut bytes = Vec::new();
            self.replies.read_until(0, &mut bytes).expect("it answers");
            assert!(bytes.pop() == Some(0), "the browser ended while asked for {method}");
            let reply: Value = serde_json::from_slice(&bytes).expect("it answers in JSON");
            if reply["id"] == json!(id) {
                assert!(reply["error"].is_null(), "{method}: {}", reply["error"]);
                return reply["result"].clone();
            }
            self.listen(&reply);
        }
    }

    fn listen(&mut self, event: &Value) {
        let params = &event["params"];
        let is_complaint = match event["method"].as_str() {
            Some("Runtime.exceptionThrown") => true,
            Some("Runtime.consoleAPICalled") => {
                ["error", "warning", "assert"].contains(&params["type"].as_str().unwrap_or(""))
            }
            Some("Log.entryAdded") => params["entry"]["level"] != "verbose",
            _ => false,
        };
        if is_complaint {
            self.complaints.push(params.to_string());
        }
    }

    /// Makes the window so large.
    pub fn resize(&mut self, width: u32, height: u32) {
        let size = json!({
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false,
        });
        self.ask("Emulation.setDeviceMetricsOverride", size);
    }

    /// Opens a file, with what comes behind the `#`.
    pub fn open(&mut self, page: &Path, fragment: &str) {
        // By way of an empty page: another fragment alone would not load it anew.
        self.ask("Page.navigate", json!({"url": "about:blank"}));
        let url = format!("file://{}#{fragment}", page.display());
        let opened = self.ask("Page.navigate", json!({"url": url}));
        assert!(opened["errorText"].is_null(), "{url}: {opened}");
        let is_open = "document.readyState === 'complete' && location.protocol === 'file:'";
        let start = Instant::now();
        while self.value(is_open) != json!(true) {
            assert!(start.elapsed() < Duration::from_secs(60), "{url} does not load");
            sleep(Duration::from_millis(20));
        }
    }

    /// The value of an expression in the page.
    pub fn value(&mut self, expression: &str) -> Value {
        let params = json!({"expression": expression, "returnByValue": true});
        let found = self.ask("Runtime.evaluate", params);
        assert!(found["exceptionDetails"].is_null(), "{expression}: {}", found["exceptionDetails"]);
        found["result"]["value"].clone()
    }

    /// Clicks into the middle of the `nth` element that a selector finds.
    pub fn click(&mut self, selector: &str, nth: usize) {
        let found = self.value(&format!(
            "(() => {{ const element = document.querySelectorAll({selector:?})[{nth}]; \
             element.scrollIntoView({{block: 'center', inline: 'center', behavior: 'instant'}}); \
             const box = element.getBoundingClientRect(); \
             return [box.x + box.width / 2, box.y + box.height / 2]; }})()"
        ));
        for kind in ["mousePressed", "mouseReleased"] {
            let params = json!({
                "type": kind, "x": found[0], "y": found[1], "button": "left", "clickCount": 1,
            });
            self.ask("Input.dispatchMouseEvent", params);
        }
    }

    /// A picture of the whole page, as PNG in base64.
    pub fn picture(&mut self) -> String {
        let params = json!({"format": "png", "captureBeyondViewport": true});
        let picture = self.ask("Page.captureScreenshot", params);
        picture["data"].as_str().expect("a picture").to_owned()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
