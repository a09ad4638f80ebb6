//! Starting programs: without a shell, in the C locale, with a time limit, and
//! with the end of their stderr in the error.
//!
//! The calling thread feeds and drains all pipes itself (`poll`), so no thread
//! is needed to write rules or to roll them back: at the limit of processes a
//! thread could not be started.

use std::error::Error;
use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use duct::{Expression, Handle, cmd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

use super::capabilities;

/// The capacity of a pipe in bytes, as far as the kernel allows it: a dump of
/// ten thousand rules, so that `iptables-save` does not wait for its reader.
/// It is the largest size that every user may ask for by default.
const PIPE: usize = 1 << 20;

/// Bytes that are read from a pipe at once.
const BUFFER: usize = 1 << 16;

/// Receives the output of a program, piece by piece.
pub type Sink<'a> = &'a mut dyn FnMut(&[u8]);

/// A program that could not be started: there is no such file, or no process
/// or pipe can be had. A later attempt may succeed.
#[derive(Debug)]
pub struct CannotStart {
    program: PathBuf,
    error: io::Error,
}

impl fmt::Display for CannotStart {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            out,
            "cannot start `{}`: {}",
            self.program.display(),
            self.error
        )
    }
}

impl Error for CannotStart {}

/// A program that a signal ended.
#[derive(Debug)]
pub struct Crashed(String);

impl fmt::Display for Crashed {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

impl Error for Crashed {}

/// A finished program.
pub struct Finished {
    program: PathBuf,
    /// The exit code; `None` when a signal ended the program.
    pub code: Option<i32>,
    /// The last lines of stderr, on one line.
    pub stderr: String,
}

impl Finished {
    /// # Errors
    /// Unless the exit code is 0, see [`Self::failure`].
    pub fn success(self) -> Result<()> {
        match self.code {
            Some(0) => Ok(()),
            _ => Err(self.failure()),
        }
    }

    /// The error of a program that failed, with the capability that may be
    /// missing; [`Crashed`] when a signal ended it.
    pub fn failure(&self) -> anyhow::Error {
        let ended = match self.code {
            Some(code) => format!("exit code {code}"),
            None => "ended by a signal".to_owned(),
        };
        let mut said = format!("`{}` failed ({ended})", self.program.display());
        if !self.stderr.is_empty() {
            said = format!("{said}: {}", self.stderr);
        }
        match self.code {
            Some(_) => anyhow!("{said}{}", capabilities::lacking()),
            None => Crashed(said).into(),
        }
    }
}

/// A started program. It is killed when it is dropped before it was finished.
pub struct Process {
    program: PathBuf,
    running: Running,
    input: Option<File>,
    output: Option<File>,
    errors: Option<File>,
    limit: Duration,
}

/// Kills and reaps the program when it is dropped.
struct Running(Handle);

impl Drop for Running {
    /// The kernel completes a system call of a killed program. Only after that
    /// a dump shows the final state.
    fn drop(&mut self) {
        const LONGEST: Duration = Duration::from_secs(10);
        self.0.kill().ok();
        self.0.wait_timeout(LONGEST).ok();
    }
}

impl Process {
    /// Starts a program with pipes for all three streams. Its time limit runs
    /// from the moment it is waited for.
    ///
    /// # Errors
    /// [`CannotStart`].
    pub fn start(program: &Path, arguments: &[&OsStr], limit: Duration) -> Result<Self> {
        Self::start_with(program, arguments, limit, &[])
    }

    /// The same with more variables in the environment.
    ///
    /// # Errors
    /// [`CannotStart`].
    pub fn start_with(
        program: &Path,
        arguments: &[&OsStr],
        limit: Duration,
        environment: &[(&str, &OsStr)],
    ) -> Result<Self> {
        let mut command = cmd(program, arguments).env("LC_ALL", "C");
        for (name, value) in environment {
            command = command.env(name, value);
        }
        Self::start_with_pipes(program, &command, limit).map_err(|error| {
            let program = program.to_owned();
            CannotStart { program, error }.into()
        })
    }

    fn start_with_pipes(program: &Path, command: &Expression, limit: Duration) -> io::Result<Self> {
        let (stdin, input) = pipe()?;
        let (output, stdout) = pipe()?;
        let (errors, stderr) = pipe()?;
        // A smaller pipe is only slower.
        fcntl_setpipe_size(&input, PIPE).ok();
        fcntl_setpipe_size(&output, PIPE).ok();
        ioctl_fionbio(&input, true)?;
        // The child's ends are dropped here with the expression.
        let handle = command
            .stdin_file(stdin)
            .stdout_file(stdout)
            .stderr_file(stderr)
            .unchecked()
            .start()?;
        Ok(Self {
            program: program.to_owned(),
            running: Running(handle),
            input: Some(input.into()),
            output: Some(output.into()),
            errors: Some(errors.into()),
            limit,
        })
    }

    /// Returns true when the program has closed its output, all of which waits
    /// in the pipe then.
    pub fn has_printed(&self) -> bool {
        let Some(output) = &self.output else {
            return true;
        };
        let mut pipe = [PollFd::new(output, PollFlags::empty())];
        poll(&mut pipe, Some(&Timespec::default())).is_ok()
            && pipe[0].revents().contains(PollFlags::HUP)
    }

    /// Feeds `input`, calls `meanwhile` once the program has all of it, and
    /// waits for the end. The output is discarded.
    ///
    /// # Errors
    /// When the program ran longer than its limit and was killed.
    pub fn feed(self, input: &[u8], meanwhile: &mut dyn FnMut()) -> Result<Finished> {
        let mut discard = |_: &[u8]| ();
        let mut session = Session::new(self, input, &mut discard);
        while session.is_feeding() && session.is_in_time() {
            session.wait_and_serve()?;
        }
        meanwhile();
        while session.is_open() && session.is_in_time() {
            session.wait_and_serve()?;
        }
        session.finish()
    }

    /// Drains the output into `sink` and waits for the end.
    ///
    /// # Errors
    /// When the program ran longer than its limit and was killed.
    pub fn drain(self, sink: Sink) -> Result<Finished> {
        let mut session = Session::new(self, b"", sink);
        while session.is_open() && session.is_in_time() {
            session.wait_and_serve()?;
        }
        session.finish()
    }
}

/// Drains several programs at the same time, each into its sink.
///
/// # Errors
/// For each program as [`Process::drain`].
pub fn drain_all<'a>(
    processes: impl IntoIterator<Item = (Process, Sink<'a>)>,
) -> Vec<Result<Finished>> {
    let sessions = processes.into_iter();
    let mut sessions: Vec<_> = sessions
        .map(|(process, sink)| Session::new(process, b"", sink))
        .collect();
    while sessions.iter().any(Session::is_waited_for) {
        if let Err(error) = wait_for(&sessions) {
            let failed = |_| Err(anyhow!("waiting for a program: {error}"));
            return sessions.iter().map(failed).collect();
        }
        for session in sessions.iter_mut().filter(|one| one.is_waited_for()) {
            session.serve();
        }
    }
    sessions.into_iter().map(Session::finish).collect()
}

/// A pipe that no other program inherits: its end for reading, and that for
/// writing.
fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(pipe_with(PipeFlags::CLOEXEC)?)
}

/// A program whose pipes are being served.
struct Session<'a> {
    process: Process,
    rest: &'a [u8],
    sink: Sink<'a>,
    stderr: Vec<u8>,
    buffer: Vec<u8>,
    deadline: Instant,
    taken: usize,
    caught_up: bool,
}

impl<'a> Session<'a> {
    fn new(process: Process, input: &'a [u8], sink: Sink<'a>) -> Self {
        let mut session = Self {
            deadline: Instant::now() + process.limit,
            process,
            rest: input,
            sink,
            stderr: Vec::new(),
            buffer: vec![0; BUFFER],
            taken: 0,
            caught_up: false,
        };
        if input.is_empty() {
            session.process.input = None;
        }
        session
    }

    fn is_feeding(&self) -> bool {
        self.process.input.is_some()
    }

    fn is_open(&self) -> bool {
        self.is_feeding() || self.process.output.is_some() || self.process.errors.is_some()
    }

    fn is_in_time(&self) -> bool {
        Instant::now() < self.deadline
    }

    fn is_waited_for(&self) -> bool {
        self.is_open() && self.is_in_time()
    }

    fn pipes(&self) -> impl Iterator<Item = PollFd<'_>> {
        let Process {
            input,
            output,
            errors,
            ..
        } = &self.process;
        let input = input.as_ref().map(|pipe| PollFd::new(pipe, PollFlags::OUT));
        let readers = [output, errors].into_iter().flatten();
        let readers = readers.map(|pipe| PollFd::new(pipe, PollFlags::IN));
        input.into_iter().chain(readers)
    }

    fn wait_and_serve(&mut self) -> io::Result<()> {
        wait_for(std::slice::from_ref(self))?;
        self.serve();
        Ok(())
    }

    /// Writes and reads as much as is possible without waiting. A pipe that
    /// fails is closed: the program's own error says more.
    fn serve(&mut self) {
        if let Some(pipe) = &mut self.process.input {
            match pipe.write(self.rest) {
                Ok(written) => self.rest = &self.rest[written..],
                Err(error) if may_go_on(&error) => {}
                Err(_) => self.rest = &[],
            }
            if self.rest.is_empty() {
                self.process.input = None;
            }
        }
        let taken = &mut self.taken;
        let caught_up = &mut self.caught_up;
        let sink = &mut self.sink;
        let buffer = &mut self.buffer;
        read_ready(&mut self.process.output, buffer, &mut |piece| {
            *taken += piece.len();
            *caught_up = piece.len() < BUFFER;
            sink(piece);
        });
        let stderr = &mut self.stderr;
        read_ready(&mut self.process.errors, buffer, &mut |piece| {
            const MOST: usize = 1 << 16;
            stderr.extend_from_slice(piece);
            let surplus = stderr.len().saturating_sub(MOST);
            stderr.drain(..surplus);
        });
    }

    /// Waits for the end of a program whose pipes are closed.
    fn finish(self) -> Result<Finished> {
        let process = self.process;
        let waited = process.running.0.wait_deadline(self.deadline);
        let waited =
            waited.with_context(|| format!("waiting for `{}`", process.program.display()))?;
        let code = match waited {
            Some(output) => output.status.code(),
            None => {
                return Err(anyhow!(
                    "`{}` took longer than {} seconds and was killed",
                    process.program.display(),
                    process.limit.as_secs()
                ));
            }
        };
        Ok(Finished {
            program: process.program,
            code,
            stderr: last_lines(&self.stderr),
        })
    }
}

/// Waits until one of the pipes is ready, or the first deadline has passed.
///
/// A program that prints megabytes does so 4 KiB at a time, and would have to
/// wake a waiting reader each time. On a host with 20,000 rules that costs a
/// sixth of the time of `iptables-save`. So after much output a reader that has
/// caught up pauses for a moment (`benches/noop.py`).
fn wait_for(sessions: &[Session]) -> io::Result<()> {
    const MUCH: usize = 1 << 17;
    const MOMENT: Duration = Duration::from_micros(100);
    let open = || sessions.iter().filter(|session| session.is_waited_for());
    if open().any(|session| session.taken > MUCH && session.caught_up) {
        thread::sleep(MOMENT);
    }
    let Some(deadline) = open().map(|session| session.deadline).min() else {
        return Ok(());
    };
    let left = deadline.saturating_duration_since(Instant::now());
    let left = Timespec::try_from(left).map_err(io::Error::other)?;
    let mut pipes: Vec<PollFd> = open().flat_map(Session::pipes).collect();
    match poll(&mut pipes, Some(&left)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Reads from a pipe if it has something. A closed one becomes `None`.
fn read_ready(pipe: &mut Option<File>, buffer: &mut [u8], take: Sink) {
    let Some(open) = pipe else {
        return;
    };
    let mut ready = [PollFd::new(&*open, PollFlags::IN)];
    if !poll(&mut ready, Some(&Timespec::default())).is_ok_and(|count| count > 0) {
        return;
    }
    match open.read(buffer) {
        Ok(0) => *pipe = None,
        Ok(count) => take(&buffer[..count]),
        Err(error) if may_go_on(&error) => {}
        Err(_) => *pipe = None,
    }
}

fn may_go_on(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// The last lines of a program's stderr, on one line.
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

    fn start(program: &str, arguments: &[&str], limit: Duration) -> Process {
        let arguments: Vec<&OsStr> = arguments.iter().map(OsStr::new).collect();
        Process::start(Path::new(program), &arguments, limit).unwrap()
    }

    /// Names may be looked up for longer than a program may take.
    #[test]
    fn the_time_limit_runs_from_the_wait() {
        let limit = Duration::from_secs(1);
        let process = start("/bin/echo", &["printed"], limit);
        thread::sleep(2 * limit);
        assert!(process.has_printed());
        let mut text = Vec::new();
        let finished = process.drain(&mut |piece| text.extend_from_slice(piece));
        assert_eq!(finished.unwrap().code, Some(0));
        assert_eq!(text, b"printed\n");
    }

    #[test]
    fn dropping_a_process_kills_it() {
        let process = start("/bin/sleep", &["60"], Duration::from_secs(60));
        assert!(!process.has_printed());
        let child = process.running.0.pids()[0];
        drop(process);
        assert!(!Path::new(&format!("/proc/{child}")).exists());
    }

    #[test]
    fn a_process_that_runs_too_long_is_killed() {
        let limit = Duration::from_millis(200);
        for arguments in [["-c", "sleep 60"], ["-c", "exec >&- 2>&-; sleep 60"]] {
            let ended = start("/bin/sh", &arguments, limit).drain(&mut |_| ());
            let error = ended.err().unwrap().to_string();
            assert!(error.contains("took longer than"), "{error}");
        }
    }

    /// More than any pipe holds, in both directions.
    #[test]
    fn large_input_and_output_pass_at_the_same_time() {
        let input = vec![b'x'; 5 * PIPE];
        let limit = Duration::from_secs(60);
        let (mut count, mut fed) = (0, false);
        let mut sink = |piece: &[u8]| count += piece.len();
        let mut session = Session::new(start("/bin/cat", &[], limit), &input, &mut sink);
        while session.is_open() {
            session.wait_and_serve().unwrap();
        }
        assert_eq!(session.finish().unwrap().code, Some(0));
        assert_eq!(count, input.len());
        // A program that does not read its input ends it.
        let finished = start("/bin/true", &[], limit).feed(&input, &mut || fed = true);
        assert_eq!(finished.unwrap().code, Some(0));
        assert!(fed);
    }

    #[test]
    fn a_program_that_is_missing_cannot_be_started() {
        let error = Process::start(Path::new("/nowhere"), &[], Duration::ZERO);
        let error = error.err().unwrap().context("reading");
        assert!(error.is::<CannotStart>(), "{error:#}");
    }
}
