//! Starting programs: without a shell, in the C locale, with a time limit, and
//! with what they said on stderr in the error.

use std::error::Error;
use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use duct::{Expression, Handle, cmd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::pipe::fcntl_setpipe_size;

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

/// Runs a program to its end with that input, and `busy` while that works.
///
/// # Errors
/// When it cannot be started, or took longer than `limit` and was killed.
pub fn run(
    program: &Path,
    arguments: &[&OsStr],
    input: &[u8],
    limit: Duration,
    busy: &mut dyn FnMut(),
) -> Result<Finished> {
    let deadline = Instant::now() + limit;
    let starting = || format!("cannot start `{}`", program.display());
    let command = command(program, arguments).stdout_null();
    let command = match in_memory(input) {
        Ok(file) => command.stdin_file(file),
        // Where that is not allowed, a thread feeds it through a pipe.
        Err(_) => command.stdin_bytes(input),
    };
    let running = Running(command.start().with_context(starting)?);
    busy();
    let finished = running.0.wait_deadline(deadline);
    let finished = finished.with_context(|| format!("waiting for `{}`", program.display()))?;
    let Some(output) = finished else {
        return Err(too_long(program, limit));
    };
    Ok(Finished {
        code: output.status.code(),
        stderr: last_lines(&output.stderr),
    })
}

/// A file that is nowhere but in memory, to be read from its beginning.
fn in_memory(text: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create("transaction", MemfdFlags::CLOEXEC)?);
    file.write_all(text)?;
    file.rewind()?;
    Ok(file)
}

/// A program that is ended when nobody waits for it any more.
struct Running(Handle);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().ok();
    }
}

/// A program whose output is to be read.
pub struct Started {
    program: PathBuf,
    running: Running,
    output: Output,
    limit: Duration,
    deadline: Instant,
}

/// Starts a program without input; from now on its time runs. It is ended when
/// its output is not wanted after all.
///
/// # Errors
/// When it cannot be started.
pub fn start(program: &Path, arguments: &[&OsStr], limit: Duration) -> Result<Started> {
    let deadline = Instant::now() + limit;
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
        output: BufReader::with_capacity(BUFFER, Unhurried::new(reader, deadline)),
        limit,
        deadline,
    })
}

impl Started {
    /// Whether it has printed all, so that nobody works while we do not read.
    pub fn has_printed(&self) -> bool {
        let mut pipe = [PollFd::new(
            &self.output.get_ref().inner,
            PollFlags::empty(),
        )];
        poll(&mut pipe, Some(&Timespec::default())).is_ok()
            && pipe[0].revents().contains(PollFlags::HUP)
    }

    /// Hands the output to `consume` as it comes.
    ///
    /// # Errors
    /// When the program fails, or took longer than its limit and was killed. Its
    /// own error comes before that of `consume`, which is mostly its consequence.
    pub fn consume<T>(mut self, consume: impl FnOnce(&mut Output) -> Result<T>) -> Result<T> {
        let consumed = consume(&mut self.output);
        // A consumer that gave up early must not leave the program writing to nobody.
        io::copy(&mut self.output, &mut io::sink()).ok();
        let finished = self.running.0.wait_deadline(self.deadline);
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

/// The error of a program that did not end well; [`Crashed`] where it has no
/// exit code.
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
        Some(_) => anyhow!(said),
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
