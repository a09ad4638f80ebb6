//! A headless Chromium, driven over its pipe: no port, no network.
//!
//! The protocol is that of its developer tools: messages in JSON, each ended by a zero byte.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Browsers need memory and time: one at once.
static ONE: Mutex<()> = Mutex::new(());

/// The time limit of a start and of each answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// Chromium passes messages on its descriptors 3 and 4. Its output is kept for a failure.
const START: &str = r#"exec chromium --headless --no-sandbox --disable-gpu --no-first-run --disable-dev-shm-usage \
    --disable-background-networking --disable-component-update --hide-scrollbars \
    --user-data-dir="$HOME/profile" --remote-debugging-pipe about:blank 3<&0 4>&1 0</dev/null 1>&2"#;

/// A browser with one page. It ends when it is dropped.
pub struct Browser {
    child: Child,
    to: Option<ChildStdin>,
    from: Receiver<Value>,
    number: u64,
    session: Option<String>,
    /// Everything that the page reported: requests, errors, messages.
    pub events: Vec<Value>,
    scratch: TempDir,
    _one: MutexGuard<'static, ()>,
}

impl Browser {
    pub fn start() -> Self {
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let scratch = tempfile::tempdir().unwrap();
        let log = File::create(scratch.path().join("log")).unwrap();
        let mut child = Command::new("sh")
            .args(["-c", START])
            .env("HOME", scratch.path())
            .env("XDG_CONFIG_HOME", scratch.path())
            .env("XDG_CACHE_HOME", scratch.path())
            .env_remove("DISPLAY")
            .env_remove("DBUS_SESSION_BUS_ADDRESS")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .process_group(0)
            .spawn()
            .unwrap();
        let to = child.stdin.take();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let (sender, from) = channel();
        std::thread::spawn(move || {
            let mut message = Vec::new();
            while output
                .read_until(0, &mut message)
                .is_ok_and(|read| read > 0)
            {
                message.pop();
                let Ok(value) = serde_json::from_slice(&message) else {
                    break;
                };
                if sender.send(value).is_err() {
                    break;
                }
                message.clear();
            }
        });
        let mut browser = Self {
            child,
            to,
            from,
            number: 0,
            session: None,
            events: Vec::new(),
            scratch,
            _one: one,
        };
        let target = browser.call("Target.createTarget", &json!({"url": "about:blank"}));
        let target = json!({"targetId": target["targetId"], "flatten": true});
        let session = browser.call("Target.attachToTarget", &target);
        browser.session = session["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.call(&format!("{domain}.enable"), &json!({}));
        }
        browser.size(1280, 900);
        browser
    }

    /// Sends a command and returns its result.
    pub fn call(&mut self, method: &str, parameters: &Value) -> Value {
        self.number += 1;
        let mut message = json!({"id": self.number, "method": method, "params": parameters});
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        let mut bytes = message.to_string().into_bytes();
        bytes.push(0);
        let to = self.to.as_mut().unwrap();
        let sent = to.write_all(&bytes).and_then(|()| to.flush());
        assert!(sent.is_ok(), "{method}: {sent:?}\n{}", self.log());
        let until = Instant::now() + PATIENCE;
        loop {
            let answer = self.next(until, method);
            if answer["id"] == self.number {
                assert!(answer["error"].is_null(), "{method}: {answer}");
                return answer["result"].clone();
            }
            self.events.push(answer);
        }
    }

    fn next(&mut self, until: Instant, awaited: &str) -> Value {
        let left = until.saturating_duration_since(Instant::now());
        let message = self.from.recv_timeout(left);
        message.unwrap_or_else(|error| {
            panic!(
                "chromium, {awaited}: {error}; tests/run.sh installs it\n{}",
                self.log()
            )
        })
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.scratch.path().join("log")).unwrap_or_default()
    }

    /// Opens a page and waits until it is loaded.
    pub fn open(&mut self, html: &str) {
        let file = self.scratch.path().join("page.html");
        std::fs::write(&file, html).unwrap();
        self.call("Page.bringToFront", &json!({}));
        self.events.clear();
        self.call(
            "Page.navigate",
            &json!({"url": format!("file://{}", file.display())}),
        );
        let until = Instant::now() + PATIENCE;
        while !self
            .events
            .iter()
            .any(|event| event["method"] == "Page.loadEventFired")
        {
            let event = self.next(until, "load");
            self.events.push(event);
        }
    }

    /// The value of an expression of JavaScript.
    pub fn value(&mut self, expression: &str) -> Value {
        let result = self.call(
            "Runtime.evaluate",
            &json!({"expression": expression, "returnByValue": true, "awaitPromise": true}),
        );
        assert!(
            result["exceptionDetails"].is_null(),
            "{expression}: {result}"
        );
        result["result"]["value"].clone()
    }

    pub fn text(&mut self, expression: &str) -> String {
        let value = self.value(expression);
        value
            .as_str()
            .unwrap_or_else(|| panic!("{expression}: {value}"))
            .to_owned()
    }

    pub fn size(&mut self, width: u32, height: u32) {
        self.call(
            "Emulation.setDeviceMetricsOverride",
            &json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}),
        );
    }

    /// Shows the page on a `screen` or in `print`, `light` or `dark`.
    pub fn medium(&mut self, medium: &str, scheme: &str) {
        let features = json!([{"name": "prefers-color-scheme", "value": scheme}]);
        self.call(
            "Emulation.setEmulatedMedia",
            &json!({"media": medium, "features": features}),
        );
    }

    pub fn scripts(&mut self, are_run: bool) {
        self.call(
            "Emulation.setScriptExecutionDisabled",
            &json!({"value": !are_run}),
        );
    }

    /// Presses a key as a keyboard does.
    pub fn press(&mut self, key: &str) {
        let (code, text) = match key {
            "Tab" => (9, None),
            "Enter" => (13, Some("\r")),
            " " => (32, Some(" ")),
            "End" => (35, None),
            other => panic!("{other}: no such key here"),
        };
        let mut event = json!({"type": "keyDown", "key": key, "windowsVirtualKeyCode": code,
            "code": if key == " " { "Space" } else { key }});
        if let Some(text) = text {
            event["text"] = json!(text);
        }
        self.call("Input.dispatchKeyEvent", &event);
        event["type"] = json!("keyUp");
        self.call("Input.dispatchKeyEvent", &event);
    }

    pub fn insert(&mut self, text: &str) {
        self.call("Input.insertText", &json!({"text": text}));
    }

    /// Prints the page on A4. Returns the number of pages and the text.
    pub fn print(&mut self) -> (usize, String) {
        let printed = self.call(
            "Page.printToPDF",
            &json!({"paperWidth": 8.27, "paperHeight": 11.69, "preferCSSPageSize": true,
                "transferMode": "ReturnAsStream"}),
        );
        let file = self.scratch.path().join("page.pdf");
        let mut pdf = File::create(&file).unwrap();
        loop {
            let part = self.call("IO.read", &json!({"handle": printed["stream"]}));
            pdf.write_all(&decoded(part["data"].as_str().unwrap()))
                .unwrap();
            if part["eof"] == true {
                break;
            }
        }
        let of = |program: &str, arguments: &[&str]| {
            let output = Command::new(program)
                .args(arguments)
                .current_dir(self.scratch.path())
                .output();
            let output = output.unwrap_or_else(|error| {
                panic!("{program}: {error}; tests/run.sh installs poppler-utils")
            });
            assert!(output.status.success(), "{program}: {output:?}");
            String::from_utf8(output.stdout).unwrap()
        };
        let facts = of("pdfinfo", &["page.pdf"]);
        let pages = facts.lines().find_map(|line| line.strip_prefix("Pages:"));
        (
            pages.unwrap().trim().parse().unwrap(),
            of("pdftotext", &["-raw", "page.pdf", "-"]),
        )
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Chromium ends when its pipe closes. Whatever is left then ends too.
        drop(self.to.take());
        let until = Instant::now() + Duration::from_secs(5);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
        let group = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(group) = group {
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

/// The bytes of a text in base64.
fn decoded(text: &str) -> Vec<u8> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bytes = Vec::new();
    let (mut bits, mut count) = (0_u32, 0);
    for digit in text.bytes().filter(|digit| *digit != b'=') {
        let value = DIGITS.iter().position(|known| *known == digit).unwrap();
        bits = bits << 6 | u32::try_from(value).unwrap();
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count & 0xff) as u8);
        }
    }
    bytes
}
