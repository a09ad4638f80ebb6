//! One probe on its way.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use httparse::{EMPTY_HEADER, Response, Status};
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::net::{connect, recv, send, socket_with, sockopt};

use super::bypass::Bypass;
use super::{HttpProbe, Probe, ProbeFailure, ProbeMethod};

/// The longest head of an answer, in bytes.
const LONGEST_HEAD: usize = 16 << 10;
/// The most headers of an answer.
const MOST_HEADERS: usize = 128;

/// The verdict of a probe.
pub(super) type Verdict = Result<(), ProbeFailure>;

/// A connection that has not come to a verdict.
pub(super) struct Connection {
    pub(super) socket: OwnedFd,
    timeout: Duration,
    exchange: Option<Exchange>,
}

/// A request and its answer.
struct Exchange {
    http: Rc<HttpProbe>,
    /// The rest of the request.
    unsent: Vec<u8>,
    /// The head of the answer as far as it has come.
    head: Vec<u8>,
}

/// A socket that closes with a reset, and that does not confirm the connection
/// before it has something to send. A connection in TIME-WAIT would stay for a
/// minute after each probe; and a probe that only connects costs three packets
/// instead of five, and never reaches the server's program or its log.
pub(super) fn socket(to: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = match to {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_linger(&socket, Some(Duration::ZERO))?;
    sockopt::set_tcp_quickack(&socket, false)?;
    Ok(socket)
}

impl Connection {
    /// Starts to connect.
    pub(super) fn open(probe: &Probe, bypass: Option<&mut Bypass>) -> Result<Self, ProbeFailure> {
        let failure = |error| ProbeFailure::of(error, probe.timeout);
        let socket = match bypass {
            None => socket(probe.address).map_err(failure)?,
            Some(bypass) => bypass.socket(probe.address, probe.timeout)?,
        };
        match connect(&socket, &probe.address) {
            Ok(()) | Err(Errno::INPROGRESS | Errno::INTR) => {}
            Err(error) => return Err(failure(error)),
        }
        let exchange = match &probe.method {
            ProbeMethod::Tcp => None,
            ProbeMethod::Http(http) => Some(Exchange::new(http)),
        };
        Ok(Self {
            socket,
            timeout: probe.timeout,
            exchange,
        })
    }

    /// Returns true if the verdict takes more than the kernel's own work.
    pub(super) fn needs_us(&self) -> bool {
        self.exchange.is_some()
    }

    /// Goes on as far as it goes without waiting.
    pub(super) fn advance(&mut self, flags: EventFlags) -> Option<Verdict> {
        let failed = flags.intersects(EventFlags::ERR | EventFlags::HUP);
        let verdict = match &mut self.exchange {
            None if failed => Err(connect_error(&self.socket)),
            None => Ok(Some(())),
            Some(exchange) => exchange.advance(&self.socket, failed),
        };
        match verdict {
            Ok(None) => None,
            Ok(Some(())) => Some(Ok(())),
            Err(Stop::Errno(error)) => Some(Err(ProbeFailure::of(error, self.timeout))),
            Err(Stop::Failure(failure)) => Some(Err(failure)),
        }
    }
}

fn connect_error(socket: &OwnedFd) -> Stop {
    match sockopt::socket_error(socket) {
        Ok(Err(error)) | Err(error) => Stop::Errno(error),
        // The other side hung up without an error.
        Ok(Ok(())) => Stop::Failure(ProbeFailure::Closed),
    }
}

/// The end of an exchange that failed.
enum Stop {
    Errno(Errno),
    Failure(ProbeFailure),
}

impl From<Errno> for Stop {
    fn from(error: Errno) -> Self {
        Self::Errno(error)
    }
}

impl From<ProbeFailure> for Stop {
    fn from(failure: ProbeFailure) -> Self {
        Self::Failure(failure)
    }
}

impl Exchange {
    fn new(http: &Rc<HttpProbe>) -> Self {
        let request = format!(
            "GET {} HTTP/1.1\r\nHost: {}\r\nUser-Agent: iptables_balance/{}\r\nAccept: */*\r\nConnection: close\r\n\r\n",
            http.path,
            http.host,
            env!("CARGO_PKG_VERSION")
        );
        Self {
            http: Rc::clone(http),
            unsent: request.into_bytes(),
            head: Vec::new(),
        }
    }

    fn advance(&mut self, socket: &OwnedFd, failed: bool) -> Result<Option<()>, Stop> {
        if failed && !self.unsent.is_empty() {
            return Err(connect_error(socket));
        }
        if !self.send(socket)? {
            return Ok(None);
        }
        self.receive(socket)
    }

    /// Returns true when all is sent.
    fn send(&mut self, socket: &OwnedFd) -> Result<bool, Stop> {
        while !self.unsent.is_empty() {
            match send(socket, &self.unsent, SendFlags::NOSIGNAL) {
                Ok(length) => drop(self.unsent.drain(..length)),
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    /// Reads until the kernel has no more, since an event is reported once.
    fn receive(&mut self, socket: &OwnedFd) -> Result<Option<()>, Stop> {
        let mut buffer = [0; 4096];
        loop {
            let length = match recv(socket, &mut buffer[..], RecvFlags::empty()) {
                Ok((0, _)) => return Err(ProbeFailure::Closed.into()),
                Ok((length, _)) => length,
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            self.head.extend(&buffer[..length]);
            if let Some(status) = final_status(&self.head)? {
                let expected = self.http.status.iter().any(|good| good.contains(&status));
                return match expected {
                    true => Ok(Some(())),
                    false => Err(ProbeFailure::status(status, &self.http).into()),
                };
            }
            if self.head.len() >= LONGEST_HEAD {
                return Err(ProbeFailure::TooLong.into());
            }
        }
    }
}

/// The status of the answer that is not a provisional one (1xx), when its head is
/// complete.
fn final_status(mut bytes: &[u8]) -> Result<Option<u16>, ProbeFailure> {
    loop {
        let mut headers = [EMPTY_HEADER; MOST_HEADERS];
        let mut response = Response::new(&mut headers);
        let parsed = response.parse(bytes);
        match (parsed, response.code) {
            (Ok(Status::Complete(length)), Some(100..=199)) => {
                bytes = bytes.get(length..).unwrap_or_default();
            }
            (Ok(Status::Complete(_)), code) => return Ok(code),
            (Ok(Status::Partial), _) => return Ok(None),
            (Err(httparse::Error::TooManyHeaders), _) => return Err(ProbeFailure::TooLong),
            (Err(_), _) => return Err(ProbeFailure::Garbage),
        }
    }
}
