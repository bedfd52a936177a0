//! A second S3 engine, Ceph's gateway: it wants tags without quotes. In the soak: setting it up takes half a minute, and its packages are large.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

#[path = "common/store_contract.rs"]
mod contract;
mod harness;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use harness::ceph::{Ceph, ceph};
use harness::weed::{ACCESS_KEY, BUCKET, SECRET_KEY, client_at, url_at, with_credentials};
use harness::{Serve, cli, need, noise, run, soak, until};
use horcrux::store::{RetryOptions, RetryStore, S3Place, S3Store, Store};

#[test]
fn cephs_gateway_keeps_the_contract_and_an_image_outlives_an_osd() {
    if !soak() {
        eprintln!("skipped: only in the soak");
        return;
    }
    if !ceph() || !need(&["nbdcopy"]) {
        return;
    }
    let mut ceph = Ceph::start();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
    let stores: Vec<Arc<dyn Store>> = (0..4)
        .map(|_| {
            let endpoint = Some(format!("http://{}", ceph.address()));
            let place = S3Place { bucket: BUCKET.into(), prefix: "contract/".into(), region: None, endpoint };
            let store = Arc::new(S3Store::with_client(place, client_at(ceph.address())));
            // As repositories are opened: it answers 500 to some of those who lose a race.
            Arc::new(RetryStore::new(store, RetryOptions::default())) as Arc<dyn Store>
        })
        .collect();
    let turn = AtomicUsize::new(0);
    runtime.block_on(contract::run(|| async {
        stores[turn.fetch_add(1, Ordering::Relaxed) % stores.len()].clone()
    }));

    // Two versions, so that a branch moves and not only comes into being.
    let dir = tempfile::tempdir().unwrap();
    let raw_file = dir.path().join("raw");
    let url = url_at(ceph.address(), "r");
    let mut raw = noise(1, 48 << 20);
    for version in 0..2u8 {
        raw[5 << 20..(5 << 20) + 4096].fill(version);
        std::fs::write(&raw_file, &raw).unwrap();
        let mut cli = cli();
        cli.args(["image-from-file", "-s", "4M", "disk"]).arg(&raw_file).arg(&url);
        with_credentials(&mut cli, ACCESS_KEY, SECRET_KEY);
        let said = run(&mut cli).ok();
        assert!(said.contains("stored as"), "{said}");
    }
    let server = Serve::new(Path::new(&url), &dir.path().join("state"))
        .name("disk")
        .credentials(ACCESS_KEY, SECRET_KEY);
    let server = server.start();
    let copy = dir.path().join("copy");
    let mut reading = Command::new("nbdcopy").arg(server.uri("disk")).arg(&copy).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(50));
    ceph.kill_osd(0);
    assert!(until(Duration::from_secs(110), || reading.try_wait().unwrap().is_some()), "{}", server.log());
    assert!(reading.wait().unwrap().success(), "{}", server.log());
    assert!(std::fs::read(&copy).unwrap() == raw, "what came back is not what went up");
    server.stop();
}
