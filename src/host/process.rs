//! Starting programs: without a shell, in the C locale, with a time limit, and
//! with what they said on stderr in the error.

use std::ffi::OsStr;
use std::io::{self, BufReader, Read};
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use duct::{Expression, cmd};

/// What a finished program left behind.
pub struct Finished {
    /// Its exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// What it said.
    pub stderr: String,
}

fn command(program: &Path, arguments: &[&OsStr]) -> Expression {
    cmd(program, arguments)
        .env("LC_ALL", "C")
        .stderr_capture()
        .unchecked()
}

/// Runs a program to its end with that input.
///
/// # Errors
/// When it cannot be started, or took longer than `limit` and was killed.
pub fn run(
    program: &Path,
    arguments: &[&OsStr],
    input: &[u8],
    limit: Duration,
) -> Result<Finished> {
    let started = command(program, arguments)
        .stdin_bytes(input)
        .stdout_null()
        .start();
    let handle = started.with_context(|| format!("cannot start `{}`", program.display()))?;
    let finished = handle.wait_timeout(limit);
    let finished = finished.with_context(|| format!("waiting for `{}`", program.display()))?;
    let Some(output) = finished else {
        handle.kill().ok();
        return Err(too_long(program, limit));
    };
    Ok(Finished {
        code: output.status.code(),
        stderr: last_lines(&output.stderr),
    })
}

/// Hands a program's output to `consume` as it comes.
///
/// # Errors
/// When it cannot be started, fails, or took longer than `limit` and was
/// killed. The program's own error comes before that of `consume`, which is
/// mostly its consequence.
pub fn stream<T>(
    program: &Path,
    arguments: &[&OsStr],
    limit: Duration,
    consume: impl FnOnce(Output<'_>) -> Result<T>,
) -> Result<T> {
    const BUFFER: usize = 1 << 16;
    let started = command(program, arguments).stdin_null().reader();
    let handle = &started.with_context(|| format!("cannot start `{}`", program.display()))?;
    let (done, watched) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let guard = scope.spawn(move || {
            let expired = watched.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout);
            if expired {
                handle.kill().ok();
            }
            expired
        });
        let consumed = consume(BufReader::with_capacity(
            BUFFER,
            Unhurried {
                inner: handle,
                taken: 0,
            },
        ));
        drain(handle);
        drop(done);
        if guard.join().unwrap_or(false) {
            return Err(too_long(program, limit));
        }
        let output = handle
            .try_wait()
            .with_context(|| format!("waiting for `{}`", program.display()))?;
        match output {
            Some(output) if output.status.success() => consumed,
            Some(output) => Err(failure(
                program,
                &last_lines(&output.stderr),
                output.status.code(),
            )),
            None => bail!("`{}` closed its output and did not end", program.display()),
        }
    })
}

/// What a program prints, as it comes.
pub type Output<'a> = BufReader<Unhurried<'a>>;

/// Reads a long output in few large pieces.
///
/// A program that prints megabytes does so 4 KiB at a time, and would have to
/// wake a waiting reader each time; on a host with 20,000 rules that costs a
/// sixth of the time that `iptables-save` takes. So once much has come, the
/// reader does something else for a moment instead of waiting.
pub struct Unhurried<'a> {
    inner: &'a duct::ReaderHandle,
    taken: usize,
}

impl Read for Unhurried<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        const MUCH: usize = 1 << 17;
        const MOMENT: Duration = Duration::from_micros(500);
        if self.taken > MUCH {
            thread::sleep(MOMENT);
        }
        let count = self.inner.read(buffer)?;
        self.taken += count;
        Ok(count)
    }
}

/// A consumer that gave up early must not leave the program writing to nobody.
fn drain(mut handle: &duct::ReaderHandle) {
    let mut rest = [0; 1 << 14];
    while handle.read(&mut rest).is_ok_and(|count| count > 0) {}
}

fn too_long(program: &Path, limit: Duration) -> anyhow::Error {
    anyhow!(
        "`{}` took longer than {} seconds and was killed",
        program.display(),
        limit.as_secs()
    )
}

/// The error of a program that did not end well.
pub fn failure(program: &Path, stderr: &str, code: Option<i32>) -> anyhow::Error {
    let ended = match code {
        Some(code) => format!("exit code {code}"),
        None => "ended by a signal".to_owned(),
    };
    match stderr.is_empty() {
        true => anyhow!("`{}` failed ({ended})", program.display()),
        false => anyhow!("`{}` failed ({ended}): {stderr}", program.display()),
    }
}

/// The end of what a program said, on one line.
fn last_lines(stderr: &[u8]) -> String {
    const MOST: usize = 6;
    let text = String::from_utf8_lossy(stderr);
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    lines[lines.len().saturating_sub(MOST)..].join("; ")
}
