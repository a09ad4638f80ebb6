//! Starting programs: without a shell, in the C locale, with a time limit, and
//! with what they said on stderr in the error.

use std::error::Error;
use std::ffi::OsStr;
use std::fmt;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use duct::{Expression, Handle, cmd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::fcntl_setpipe_size;

use super::capabilities;

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
    let command = command(program, arguments).stdin_bytes(input).stdout_null();
    let started = command.start();
    let running = started.with_context(|| format!("cannot start `{}`", program.display()))?;
    let running = Running(running);
    let finished = running.0.wait_timeout(limit);
    let finished = finished.with_context(|| format!("waiting for `{}`", program.display()))?;
    let Some(output) = finished else {
        return Err(too_long(program, limit));
    };
    Ok(Finished {
        code: output.status.code(),
        stderr: last_lines(&output.stderr),
    })
}

/// A program that is ended when nobody waits for it any more.
struct Running(Handle);

impl Drop for Running {
    /// What it has begun in the kernel it brings to an end even then, and until
    /// it has, what is read is not what will be.
    fn drop(&mut self) {
        const LONGEST: Duration = Duration::from_secs(10);
        self.0.kill().ok();
        self.0.wait_timeout(LONGEST).ok();
    }
}

/// A program whose output is to be read.
pub struct Started {
    program: PathBuf,
    running: Running,
    output: io::PipeReader,
    limit: Duration,
}

/// Starts a program without input. Its time runs from when it is waited for. It
/// is ended when its output is not wanted after all.
///
/// # Errors
/// When it cannot be started.
pub fn start(program: &Path, arguments: &[&OsStr], limit: Duration) -> Result<Started> {
    let starting = || format!("cannot start `{}`", program.display());
    let (reader, writer) = io::pipe().with_context(starting)?;
    // A smaller pipe is only slower.
    fcntl_setpipe_size(&reader, PIPE).ok();
    // The other end of the pipe must not outlive this statement here.
    let handle = command(program, arguments)
        .stdin_null()
        .stdout_file(writer)
        .start()
        .with_context(starting)?;
    Ok(Started {
        program: program.to_owned(),
        running: Running(handle),
        output: reader,
        limit,
    })
}

impl Started {
    /// Whether it has closed its output, all of which waits in the pipe then.
    pub fn has_printed(&self) -> bool {
        let mut pipe = [PollFd::new(&self.output, PollFlags::empty())];
        poll(&mut pipe, Some(&Timespec::default())).is_ok()
            && pipe[0].revents().contains(PollFlags::HUP)
    }

    /// Hands the output to `consume` as it comes.
    ///
    /// # Errors
    /// When the program fails, or took longer than its limit and was killed. Its
    /// own error comes before that of `consume`, which is mostly its consequence.
    pub fn consume<T>(self, consume: impl FnOnce(&mut Output) -> Result<T>) -> Result<T> {
        let deadline = Instant::now() + self.limit;
        let output = Unhurried::new(self.output, deadline);
        let mut output = BufReader::with_capacity(BUFFER, output);
        let consumed = consume(&mut output);
        // A consumer that gave up early must not leave the program writing to nobody.
        io::copy(&mut output, &mut io::sink()).ok();
        let finished = self.running.0.wait_deadline(deadline);
        match finished.with_context(|| format!("waiting for `{}`", self.program.display()))? {
            Some(finished) if finished.status.success() => consumed,
            Some(finished) => Err(failure(
                &self.program,
                &last_lines(&finished.stderr),
                finished.status.code(),
            )),
            None => Err(too_long(&self.program, self.limit)),
        }
    }
}

/// What a program prints, as it comes.
pub type Output = BufReader<Unhurried>;

/// How much is taken from the pipe at once.
const BUFFER: usize = 1 << 16;

/// How much the pipe holds, if the kernel lets us have it: a dump of ten
/// thousand rules, so that a program that prints one does not have to wait for
/// us in between. It is the most that anybody may ask for by default.
const PIPE: usize = 1 << 20;

/// Reads a long output in few large pieces, until its deadline.
///
/// A program that prints megabytes does so 4 KiB at a time, and would have to
/// wake a waiting reader each time; on a host with 20,000 rules that costs a
/// sixth of the time that `iptables-save` takes. So once much has come, the
/// reader does something else for a moment when it has caught up.
pub struct Unhurried {
    inner: io::PipeReader,
    deadline: Instant,
    taken: usize,
    caught_up: bool,
    ended: bool,
}

impl Unhurried {
    fn new(inner: io::PipeReader, deadline: Instant) -> Self {
        Self {
            inner,
            deadline,
            taken: 0,
            caught_up: true,
            ended: false,
        }
    }

    fn wait(&self) -> io::Result<()> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let limit = Timespec::try_from(left).map_err(io::Error::other)?;
        let mut pipe = [PollFd::new(&self.inner, PollFlags::IN)];
        let is_late = left.is_zero() || poll(&mut pipe, Some(&limit))? == 0;
        match is_late {
            true => Err(io::ErrorKind::TimedOut.into()),
            false => Ok(()),
        }
    }
}

impl Read for Unhurried {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        const MUCH: usize = 1 << 17;
        const MOMENT: Duration = Duration::from_micros(100);
        if self.ended {
            return Ok(0);
        }
        if self.taken > MUCH && self.caught_up {
            thread::sleep(MOMENT);
        }
        self.wait()?;
        let count = self.inner.read(buffer)?;
        self.taken += count;
        self.caught_up = count < buffer.len();
        self.ended = count == 0;
        Ok(count)
    }
}

fn too_long(program: &Path, limit: Duration) -> anyhow::Error {
    anyhow!(
        "`{}` took longer than {} seconds and was killed",
        program.display(),
        limit.as_secs()
    )
}

/// A program was ended by a signal.
#[derive(Debug)]
pub struct Crashed(String);

impl fmt::Display for Crashed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl Error for Crashed {}

/// The error of a program that did not end well, with the right that may be
/// missing; [`Crashed`] where it has no exit code.
pub fn failure(program: &Path, stderr: &str, code: Option<i32>) -> anyhow::Error {
    let ended = match code {
        Some(code) => format!("exit code {code}"),
        None => "ended by a signal".to_owned(),
    };
    let mut said = format!("`{}` failed ({ended})", program.display());
    if !stderr.is_empty() {
        said = format!("{said}: {stderr}");
    }
    match code {
        Some(_) => anyhow!("{said}{}", capabilities::lacking()),
        None => Crashed(said).into(),
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Names may be looked up for longer than a program may take.
    #[test]
    fn what_was_printed_long_ago_is_not_late() {
        let limit = Duration::from_secs(1);
        let arguments = ["printed"].map(OsStr::new);
        let started = start(Path::new("/bin/echo"), &arguments, limit).unwrap();
        thread::sleep(2 * limit);
        assert!(started.has_printed());
        let read = started.consume(|output| Ok(io::read_to_string(output)?));
        assert_eq!(read.unwrap(), "printed\n");
    }

    #[test]
    fn what_is_not_waited_for_any_more_has_ended() {
        let limit = Duration::from_secs(60);
        let arguments = ["60"].map(OsStr::new);
        let started = start(Path::new("/bin/sleep"), &arguments, limit).unwrap();
        assert!(!started.has_printed());
        let child = started.running.0.pids()[0];
        drop(started);
        assert!(!Path::new(&format!("/proc/{child}")).exists());
    }
}
