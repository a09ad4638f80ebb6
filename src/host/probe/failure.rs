//! The reasons why a probe fails, in words.

use std::fmt;
use std::io;
use std::time::Duration;

use rustix::io::Errno;

use super::HttpProbe;

/// The reason why a probe failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeFailure {
    /// Nobody listens.
    Refused,
    /// The connection was reset before there was an answer.
    Reset,
    /// There was no whole answer in this time.
    TimedOut(Duration),
    /// There is no way to the host or the network.
    Unreachable,
    /// The connection was closed before there was a whole answer.
    Closed,
    /// An unexpected status.
    Status {
        /// The status of the answer.
        status: u16,
        /// The expected ones, as a user writes them.
        expected: String,
    },
    /// The answer is not HTTP.
    Garbage,
    /// The head of the answer does not end within 16 KiB, or within 128 headers.
    TooLong,
    /// This host can make no connection now: no descriptor, port or memory is
    /// left. That says nothing about the backend.
    Local(String),
    /// Any other error of the kernel.
    Io(String),
}

impl ProbeFailure {
    /// Returns true if the failure says something about the backend.
    #[must_use]
    pub fn blames_the_backend(&self) -> bool {
        !matches!(self, Self::Local(_))
    }

    pub(super) fn status(status: u16, http: &HttpProbe) -> Self {
        let range = |range: &std::ops::RangeInclusive<u16>| match (range.start(), range.end()) {
            (start, end) if start == end => start.to_string(),
            (start, end) => format!("{start}-{end}"),
        };
        let expected: Vec<String> = http.status.iter().map(range).collect();
        Self::Status {
            status,
            expected: expected.join(", "),
        }
    }

    /// The meaning of an error that the kernel gives for a connection.
    pub(super) fn of(error: Errno, timeout: Duration) -> Self {
        match error {
            Errno::CONNREFUSED => Self::Refused,
            Errno::CONNRESET | Errno::CONNABORTED | Errno::PIPE => Self::Reset,
            Errno::TIMEDOUT => Self::TimedOut(timeout),
            Errno::HOSTUNREACH | Errno::NETUNREACH | Errno::HOSTDOWN | Errno::NETDOWN => {
                Self::Unreachable
            }
            Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM | Errno::AGAIN => {
                Self::local(error)
            }
            Errno::ADDRNOTAVAIL | Errno::ADDRINUSE => Self::local(error),
            Errno::PERM | Errno::ACCESS => {
                Self::Io("a rule of this host forbids the connection".to_owned())
            }
            _ => Self::Io(words(&error.into())),
        }
    }

    pub(super) fn local(error: impl Into<io::Error>) -> Self {
        Self::Local(words(&error.into()))
    }
}

/// The kernel's words without Rust's number after them.
fn words(error: &io::Error) -> String {
    let text = error.to_string().to_lowercase();
    match text.split_once(" (os error") {
        Some((words, _)) => words.to_owned(),
        None => text,
    }
}

impl fmt::Display for ProbeFailure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused => out.write_str("connection refused"),
            Self::Reset => out.write_str("connection reset"),
            Self::TimedOut(timeout) => write!(out, "no answer within {}", Seconds(*timeout)),
            Self::Unreachable => out.write_str("no route to the host"),
            Self::Closed => out.write_str("connection closed before an answer"),
            Self::Status { status, expected } => {
                write!(out, "status {status} instead of {expected}")
            }
            Self::Garbage => out.write_str("the answer is not HTTP"),
            Self::TooLong => out.write_str("the head of the answer does not end within 16 KiB"),
            Self::Local(error) => write!(out, "this host could not probe: {error}"),
            Self::Io(error) => out.write_str(error),
        }
    }
}

/// A duration as a user writes it: `1 s`, `0.2 s`.
struct Seconds(Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, millis) = (self.0.as_secs(), self.0.subsec_millis());
        match millis {
            0 => write!(out, "{seconds} s"),
            _ => {
                let decimals = format!("{millis:03}");
                write!(out, "{seconds}.{} s", decimals.trim_end_matches('0'))
            }
        }
    }
}
