//! Probes of real servers on loopback.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::Command;
use std::rc::Rc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt;
use rustix::process::{Resource, Rlimit, setrlimit};

use super::*;

/// Long enough for anything that answers.
const PATIENCE: Duration = Duration::from_secs(20);
/// Short, for servers that do not answer.
const SHORT: Duration = Duration::from_millis(150);

fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// A server that treats each connection like this, in a thread that ends with the
/// tests.
fn server(serve: impl Fn(TcpStream) + Send + 'static) -> SocketAddr {
    let (listener, address) = listener();
    // Room for a thousand that are not accepted yet.
    rustix::net::listen(&listener, 2000).unwrap();
    thread::spawn(move || listener.incoming().flatten().for_each(serve));
    address
}

/// A server that reads the request and sends an answer.
fn answering(answer: &'static [u8]) -> SocketAddr {
    server(move |mut stream| {
        read_request(&mut stream);
        stream.write_all(answer).ok();
    })
}

fn read_request(stream: &mut TcpStream) -> Vec<u8> {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(1) => request.extend(byte),
            _ => break,
        }
    }
    request
}

fn reset(stream: TcpStream) {
    sockopt::set_socket_linger(stream.as_fd(), Some(Duration::ZERO)).unwrap();
    drop(stream);
}

/// An address where nobody listens.
fn nobody() -> SocketAddr {
    listener().1
}

/// A listener that takes no more connections: its queue is full.
fn full_listener() -> (Vec<TcpStream>, TcpListener, SocketAddr) {
    let (listener, address) = listener();
    rustix::net::listen(&listener, 0).unwrap();
    let connect = |_| TcpStream::connect_timeout(&address, SHORT).ok();
    let streams = (0..4).map_while(connect).collect();
    (streams, listener, address)
}

fn tcp(address: SocketAddr, timeout: Duration) -> Probe {
    Probe {
        address,
        method: ProbeMethod::Tcp,
        timeout,
    }
}

fn http(address: SocketAddr, timeout: Duration) -> Probe {
    let http = HttpProbe {
        path: "/health?deep=1".to_owned(),
        host: "balanced.example".to_owned(),
        status: vec![200..=399],
    };
    Probe {
        address,
        method: ProbeMethod::Http(Rc::new(http)),
        timeout,
    }
}

/// The results of all that runs.
fn finish(prober: &mut Prober) -> Vec<ProbeResult> {
    let mut results = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while !prober.is_idle() {
        assert!(Instant::now() < deadline, "{} results", results.len());
        prober.wait(Some(deadline), &mut results).unwrap();
    }
    results.sort_by_key(|(id, _)| *id);
    results
}

fn verdict(probe: &Probe) -> Result<(), ProbeFailure> {
    let mut prober = Prober::new().unwrap();
    prober.start(7, probe);
    let results = finish(&mut prober);
    assert_eq!(results.len(), 1);
    assert_eq!(results[0].0, 7);
    results[0].1.clone()
}

fn failure(probe: &Probe) -> String {
    verdict(probe).unwrap_err().to_string()
}

#[test]
fn a_connection_that_is_accepted_is_enough_for_tcp() {
    let (_listener, address) = listener();
    assert_eq!(verdict(&tcp(address, PATIENCE)), Ok(()));
    let listener = TcpListener::bind("[::1]:0").unwrap();
    assert_eq!(
        verdict(&tcp(listener.local_addr().unwrap(), PATIENCE)),
        Ok(())
    );
}

#[test]
fn a_probe_that_only_connects_does_not_reach_the_servers_program() {
    let (listener, address) = listener();
    listener.set_nonblocking(true).unwrap();
    for _ in 0..5 {
        assert_eq!(verdict(&tcp(address, PATIENCE)), Ok(()));
        let error = listener.accept().unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    }
}

#[test]
fn an_exchange_ends_with_a_reset_so_that_no_port_waits() {
    let (sender, receiver) = mpsc::channel();
    let address = server(move |mut stream| {
        read_request(&mut stream);
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").ok();
        let end = stream.read(&mut [0]).map_err(|error| error.kind());
        sender.send(end).ok();
    });
    assert_eq!(verdict(&http(address, PATIENCE)), Ok(()));
    let end = receiver.recv().unwrap();
    assert_eq!(end, Err(std::io::ErrorKind::ConnectionReset));
}

#[test]
fn nobody_who_listens_is_a_refusal() {
    assert_eq!(failure(&tcp(nobody(), PATIENCE)), "connection refused");
    assert_eq!(failure(&http(nobody(), PATIENCE)), "connection refused");
}

#[test]
fn a_full_queue_is_no_answer() {
    let (_streams, _listener, address) = full_listener();
    assert_eq!(failure(&tcp(address, SHORT)), "no answer within 0.15 s");
    assert_eq!(failure(&http(address, SHORT)), "no answer within 0.15 s");
}

#[test]
fn a_good_status_is_a_good_answer() {
    for answer in [
        &b"HTTP/1.1 200 OK\r\n\r\n"[..],
        b"HTTP/1.0 302 Found\r\nLocation: /\r\n\r\nbody",
        b"HTTP/1.1 204\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
    ] {
        let answered = verdict(&http(answering(answer), PATIENCE));
        assert_eq!(answered, Ok(()), "{}", String::from_utf8_lossy(answer));
    }
}

#[test]
fn a_wrong_status_names_the_expected_ones() {
    let address = answering(b"HTTP/1.1 503 Service Unavailable\r\n\r\n");
    assert_eq!(
        failure(&http(address, PATIENCE)),
        "status 503 instead of 200-399"
    );
    let wanted = HttpProbe {
        path: "/".to_owned(),
        host: "x".to_owned(),
        status: vec![200..=200, 204..=206],
    };
    let probe = Probe {
        method: ProbeMethod::Http(Rc::new(wanted)),
        ..tcp(answering(b"HTTP/1.1 301 Moved\r\n\r\n"), PATIENCE)
    };
    assert_eq!(failure(&probe), "status 301 instead of 200, 204-206");
    let provisional = answering(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 No\r\n\r\n");
    assert_eq!(
        failure(&http(provisional, PATIENCE)),
        "status 404 instead of 200-399"
    );
}

#[test]
fn the_request_is_the_one_that_was_asked_for() {
    let (sender, receiver) = mpsc::channel();
    let address = server(move |mut stream| {
        sender.send(read_request(&mut stream)).ok();
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").ok();
    });
    assert_eq!(verdict(&http(address, PATIENCE)), Ok(()));
    let request = String::from_utf8(receiver.recv().unwrap()).unwrap();
    let lines: Vec<&str> = request.split("\r\n").collect();
    assert_eq!(lines[0], "GET /health?deep=1 HTTP/1.1");
    assert_eq!(lines[1], "Host: balanced.example");
    assert!(lines[2].starts_with("User-Agent: iptables_balance/"));
    assert!(lines.contains(&"Connection: close"));
    assert!(request.ends_with("\r\n\r\n"));
}

#[test]
fn a_bad_answer_is_described() {
    let cases: [(&[u8], &str); 4] = [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "the answer is not HTTP"),
        (b"\x15\x03\x01\x00\x02\x02\x16", "the answer is not HTTP"),
        (b"", "connection closed before an answer"),
        (
            b"HTTP/1.1 200 OK\r\nServer:",
            "connection closed before an answer",
        ),
    ];
    for (answer, words) in cases {
        assert_eq!(failure(&http(answering(answer), PATIENCE)), words);
    }
}

#[test]
fn an_endless_head_is_bounded() {
    let too_long = "the head of the answer does not end within 16 KiB";
    let endless = |start: &'static [u8], line: &'static [u8]| {
        server(move |mut stream| {
            read_request(&mut stream);
            stream.write_all(start).ok();
            while stream.write_all(line).is_ok() {}
        })
    };
    let status = b"HTTP/1.1 200 OK\r\n";
    let provisional = b"HTTP/1.1 100 Continue\r\n\r\n";
    for (start, line) in [
        (&status[..], &b"X: y\r\n"[..]),
        (status, b"xxxxxxxxxxxxxxxxxxxxxxxxxxxx"),
        (provisional, provisional),
    ] {
        let started = Instant::now();
        assert_eq!(failure(&http(endless(start, line), PATIENCE)), too_long);
        assert!(started.elapsed() < PATIENCE / 2);
    }
}

#[test]
fn a_reset_is_told_from_an_end() {
    let address = server(|mut stream| {
        read_request(&mut stream);
        reset(stream);
    });
    assert_eq!(failure(&http(address, PATIENCE)), "connection reset");
    let address = server(|mut stream| {
        read_request(&mut stream);
        stream.shutdown(Shutdown::Both).ok();
    });
    assert_eq!(
        failure(&http(address, PATIENCE)),
        "connection closed before an answer"
    );
}

#[test]
fn a_slow_drip_is_bounded_in_all() {
    let address = server(|mut stream| {
        read_request(&mut stream);
        let drip = |byte: &u8| {
            thread::sleep(Duration::from_millis(20));
            stream.write_all(&[*byte]).is_ok()
        };
        // A whole answer, only slower than anybody waits.
        let answer = [
            b"HTTP/1.1 200 OK\r\nX: ".as_slice(),
            &[b'x'; 500],
            b"\r\n\r\n",
        ]
        .concat();
        answer.iter().all(drip);
    });
    let started = Instant::now();
    assert_eq!(failure(&http(address, SHORT)), "no answer within 0.15 s");
    let took = started.elapsed();
    assert!(took >= SHORT && took < SHORT * 10, "{took:?}");
}

#[test]
fn a_busy_caller_does_not_make_good_answers_late() {
    let (_listener, accepting) = listener();
    let address = answering(b"HTTP/1.1 200 OK\r\n\r\n");
    let mut prober = Prober::new().unwrap();
    prober.start(1, &tcp(accepting, SHORT));
    prober.start(2, &http(address, SHORT));
    thread::sleep(SHORT * 3);
    assert_eq!(finish(&mut prober), [(1, Ok(())), (2, Ok(()))]);
}

#[test]
fn a_caller_that_is_busy_does_not_make_silence_an_answer() {
    let (_streams, _listener, full) = full_listener();
    let (_silent, silent) = listener();
    let mut prober = Prober::new().unwrap();
    prober.start(1, &tcp(full, SHORT));
    prober.start(2, &http(silent, SHORT));
    thread::sleep(SHORT * 3);
    let late = Err(ProbeFailure::TimedOut(SHORT));
    assert_eq!(finish(&mut prober), [(1, late.clone()), (2, late)]);
}

#[test]
fn a_thousand_probes_run_at_once() {
    let (_streams, _listener, full) = full_listener();
    let good = answering(b"HTTP/1.1 200 OK\r\n\r\n");
    let gone = nobody();
    let mut prober = Prober::new().unwrap();
    let started = Instant::now();
    for id in 0..1000 {
        match id % 10 {
            0 => prober.start(id, &tcp(full, Duration::from_secs(1))),
            1 => prober.start(id, &tcp(gone, PATIENCE)),
            _ => prober.start(id, &http(good, PATIENCE)),
        }
    }
    let results = finish(&mut prober);
    assert!(started.elapsed() < Duration::from_secs(10));
    assert_eq!(results.len(), 1000);
    for (place, (id, result)) in results.iter().enumerate() {
        assert_eq!(place, *id);
        let expected = match id % 10 {
            0 => Err(ProbeFailure::TimedOut(Duration::from_secs(1))),
            1 => Err(ProbeFailure::Refused),
            _ => Ok(()),
        };
        assert_eq!(result, &expected, "{id}");
    }
}

#[test]
fn a_probe_that_is_cancelled_has_no_result() {
    let (_silent, silent) = listener();
    let mut prober = Prober::new().unwrap();
    prober.start(1, &http(silent, PATIENCE));
    prober.start(2, &tcp(silent, PATIENCE));
    prober.cancel(1);
    assert_eq!(finish(&mut prober), [(2, Ok(()))]);
    // A result that is known at once is dropped too.
    let unreachable = tcp("255.255.255.255:1".parse().unwrap(), PATIENCE);
    prober.start(4, &unreachable);
    assert!(!prober.is_idle());
    prober.cancel(4);
    assert!(prober.is_idle());
    prober.start(5, &unreachable);
    prober.start(5, &unreachable);
    assert_eq!(finish(&mut prober), [(5, Err(ProbeFailure::Unreachable))]);
    // The same number starts again in place of the former probe.
    prober.start(3, &http(silent, PATIENCE));
    prober.start(3, &tcp(nobody(), PATIENCE));
    assert_eq!(finish(&mut prober), [(3, Err(ProbeFailure::Refused))]);
}

#[test]
fn a_source_ends_the_wait_and_so_does_the_deadline() {
    let (readable, mut writer) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut prober = Prober::new().unwrap();
    assert_eq!(prober.wait(None, &mut Vec::new()).unwrap(), []);
    prober.add_source(&readable, SourceKey(3)).unwrap();
    let soon = Instant::now() + Duration::from_millis(30);
    assert_eq!(prober.wait(Some(soon), &mut Vec::new()).unwrap(), []);
    assert!(Instant::now() >= soon);
    writer.write_all(b"x").unwrap();
    for _ in 0..2 {
        // As long as nobody reads from it.
        let ready = prober.wait(None, &mut Vec::new()).unwrap();
        assert_eq!(ready, [SourceKey(3)]);
    }
}

/// Runs one test of this file in a process of its own, with this variable set.
fn alone(test: &str, variable: &str) -> bool {
    if std::env::var_os(variable).is_some() {
        return true;
    }
    let name = format!("host::probe::tests::{test}");
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &name, "--nocapture"])
        .env(variable, "1")
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && told.contains("1 passed"),
        "{told}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    false
}

fn limit_descriptors(current: u64, maximum: u64) {
    let limit = Rlimit {
        current: Some(current),
        maximum: Some(maximum),
    };
    setrlimit(Resource::Nofile, limit).unwrap();
}

#[test]
fn more_probes_than_descriptors_wait_for_their_turn() {
    if !alone(
        "more_probes_than_descriptors_wait_for_their_turn",
        "IPTABLES_BALANCE_TEST_FEW",
    ) {
        return;
    }
    let address = answering(b"HTTP/1.1 200 OK\r\n\r\n");
    limit_descriptors(80, 80);
    let mut prober = Prober::new().unwrap();
    (0..200).for_each(|id| prober.start(id, &http(address, PATIENCE)));
    (150..200).for_each(|id| prober.cancel(id));
    let results = finish(&mut prober);
    assert_eq!(results.len(), 150);
    assert!(results.iter().all(|(_, result)| result.is_ok()));
}

#[test]
fn the_limit_of_descriptors_is_raised_when_it_is_in_the_way() {
    if !alone(
        "the_limit_of_descriptors_is_raised_when_it_is_in_the_way",
        "IPTABLES_BALANCE_TEST_RAISED",
    ) {
        return;
    }
    limit_descriptors(80, 400);
    let (_silent, silent) = listener();
    let mut prober = Prober::new().unwrap();
    (0..200).for_each(|id| prober.start(id, &http(silent, SHORT)));
    let started = Instant::now();
    assert_eq!(finish(&mut prober).len(), 200);
    assert!(started.elapsed() < SHORT * 2, "they did not run at once");
}

#[test]
fn without_a_descriptor_the_backend_is_not_to_blame() {
    if !alone(
        "without_a_descriptor_the_backend_is_not_to_blame",
        "IPTABLES_BALANCE_TEST_NONE",
    ) {
        return;
    }
    let (_listener, address) = listener();
    let mut prober = Prober::new().unwrap();
    limit_descriptors(80, 80);
    let mut files = Vec::new();
    while let Ok(file) = std::fs::File::open("/dev/null") {
        files.push(file);
    }
    prober.start(1, &tcp(address, PATIENCE));
    let results = finish(&mut prober);
    let failure = results[0].1.clone().unwrap_err();
    assert!(!failure.blames_the_backend(), "{failure}");
    assert_eq!(
        failure.to_string(),
        "this host could not probe: too many open files"
    );
    // One is enough for all, one after the other.
    files.pop();
    (0..20).for_each(|id| prober.start(id, &tcp(address, PATIENCE)));
    let results = finish(&mut prober);
    assert_eq!(results.len(), 20);
    assert!(results.iter().all(|(_, result)| result.is_ok()));
}

#[test]
fn the_kernels_errors_have_plain_words() {
    use rustix::io::Errno;
    let words = |error| ProbeFailure::of(error, Duration::from_millis(1500)).to_string();
    assert_eq!(words(Errno::HOSTUNREACH), "no route to the host");
    assert_eq!(words(Errno::NETUNREACH), "no route to the host");
    assert_eq!(words(Errno::TIMEDOUT), "no answer within 1.5 s");
    assert_eq!(
        words(Errno::PERM),
        "a rule of this host forbids the connection"
    );
    assert_eq!(words(Errno::INVAL), "invalid argument");
}
