//! What is absent is part of the design.

use std::fs;
use std::path::{Path, PathBuf};

fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path, text));
            }
        }
    }
    found
}

/// The part of a file that is not its tests.
fn code(text: &str) -> &str {
    text.split("#[cfg(test)]").next().unwrap()
}

fn assert_only_in(allowed: &[&str], words: &[&str]) {
    for (path, text) in sources("src") {
        let is_test = path.ends_with("tests.rs");
        let allowed = is_test
            || allowed
                .iter()
                .any(|part| path.to_string_lossy().contains(part));
        for word in words {
            assert!(
                allowed || !code(&text).contains(word),
                "{} has {word}",
                path.display()
            );
        }
    }
}

#[test]
fn nothing_but_the_host_starts_a_process_or_reads_the_kernels_files() {
    assert_only_in(
        &["src/host/"],
        &["duct::", "process::Command", "\"/proc", "\"/sys"],
    );
}

#[test]
fn no_shell_is_ever_started() {
    assert_only_in(&[], &["\"sh\"", "\"bash\"", "/bin/sh", "sh_dangerous"]);
}

#[test]
fn nothing_but_the_choice_of_front_end_has_standard_output() {
    assert_only_in(&["src/frontend/mod.rs"], &["io::stdout", "io::stderr"]);
    assert_only_in(&[], &["println!", "eprintln!", "print!("]);
}

#[test]
fn the_pure_rooms_cannot_fail() {
    for (path, text) in sources("src") {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if [
            "turns.rs",
            "chances.rs",
            "arrangement.rs",
            "plan.rs",
            "diff.rs",
            "restore.rs",
            "change.rs",
            "align.rs",
            "distribution.rs",
        ]
        .contains(&name.as_str())
        {
            assert!(!code(&text).contains("Result<"), "{name} returns a Result");
        }
    }
}

#[test]
fn no_float_decides_anything() {
    assert_only_in(
        &[
            "src/netfilter/statistic.rs",
            "src/report.rs",
            "src/frontend/terminal.rs",
            "src/request/json.rs",
        ],
        &["f64", "f32"],
    );
}

#[test]
fn no_front_end_knows_another() {
    for front in ["ansible", "json", "cli", "cfengine"] {
        assert_only_in(
            &["src/frontend/mod.rs", &format!("src/frontend/{front}.rs")],
            &[&format!("crate::frontend::{front}")],
        );
    }
}

/// A file that is longer than this is two rooms.
#[test]
fn no_file_is_too_long() {
    for (path, text) in sources("src") {
        let lines = code(&text).lines().count();
        assert!(lines <= 600, "{} has {lines} lines", path.display());
    }
}

#[test]
fn every_dependency_says_why() {
    let manifest =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")).unwrap();
    let mut section = "";
    for line in manifest.lines() {
        if line.starts_with('[') {
            section = line;
            assert!(
                !line.contains("dependencies.") || line.contains('#'),
                "{line}"
            );
        } else if section.ends_with("dependencies]") && line.contains(" = ") {
            assert!(line.contains('#'), "{line}");
        }
    }
}
