//! Where bundles are on this host.

use super::{
    env::{self, Env},
    mistake::{Mistake, Problem},
};
use crate::{
    files::{MAX_FILE, Root, read_text},
    workload::{is_dns_label, token::TokenFile},
};
use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

/// Our own place: one directory a workload.
pub(super) const OURS: &str = "/etc/we-agent";
/// The five files as istioctl names them.
pub(super) const FILES: [&str; 5] = ["cluster.env", "mesh.yaml", "root-cert.pem", "istio-token", "hosts"];
/// What follows the workload's name in the credential that makes a workload.
const CREDENTIAL: &str = "_cluster.env";
/// Name of the workload of an Istio layout whose group is not known.
const UNNAMED: &str = "istio";

/// The files of one bundle, whether they exist or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BundleDir {
    /// Environment files; later ones win, the last one must exist.
    pub env: Vec<PathBuf>,
    /// MeshConfig with `defaultConfig`.
    pub mesh: PathBuf,
    /// Places of the mesh's roots; the first that exists counts.
    pub roots: Vec<PathBuf>,
    /// The token.
    pub token: TokenFile,
    /// Names of the control plane. None in Istio's layout, where they are in `/etc/hosts`.
    pub hosts: Option<PathBuf>,
    /// Whether it is Istio's layout.
    pub istio: bool,
    /// Credentials of the service that are not used, because the directory has a file of that name.
    pub hidden: Vec<PathBuf>,
    /// Where files of the bundle could be, but are not.
    elsewhere: Vec<PathBuf>,
    /// Set when the directory cannot give its name to a workload.
    pub(super) bad_name: Option<Mistake>,
}

impl BundleDir {
    /// The five files as istioctl wrote them into `dir`.
    pub fn directory(dir: &Path) -> Self {
        Self {
            env: vec![dir.join("cluster.env")],
            mesh: dir.join("mesh.yaml"),
            roots: vec![dir.join("root-cert.pem")],
            token: TokenFile::new(dir.join("istio-token")),
            hosts: Some(dir.join("hosts")),
            istio: false,
            hidden: Vec::new(),
            elsewhere: Vec::new(),
            bad_name: None,
        }
    }

    /// The files where Istio's documentation and its VM image put them. Both places of the root are looked at, with
    /// or without `PROV_CERT`.
    pub fn istio(root: &Root) -> Self {
        Self {
            env: ["sidecar.env", "cluster.env"].map(|f| root.path("/var/lib/istio/envoy").join(f)).to_vec(),
            mesh: root.path("/etc/istio/config/mesh"),
            roots: ["/etc/certs/root-cert.pem", "/var/run/secrets/istio/root-cert.pem"].map(|f| root.path(f)).to_vec(),
            token: TokenFile::new(root.path("/var/run/secrets/tokens/istio-token")),
            hosts: None,
            istio: true,
            hidden: Vec::new(),
            elsewhere: Vec::new(),
            bad_name: None,
        }
    }

    /// With the credentials `<name>_<file>` of our service in `dir` (`$CREDENTIALS_DIRECTORY`) standing in for files that
    /// are not there. `LoadCredential=<name>:<directory>` makes such names of a directory (systemd.exec(5)). A file wins:
    /// it can be renewed while we run, and a credential is a copy that was made when the service started.
    fn with_credentials(mut self, dir: &Path, name: &str) -> Self {
        let of = |file: &Path| dir.join(format!("{name}_{}", file.file_name().unwrap_or_default().to_string_lossy()));
        let one = [&mut self.mesh].into_iter().chain(&mut self.hosts);
        for file in self.env.iter_mut().chain(&mut self.roots).chain(one) {
            let credential = of(file);
            match (exists(file), exists(&credential)) {
                (true, true) => self.hidden.push(credential),
                (false, true) => self.elsewhere.push(std::mem::replace(file, credential)),
                (_, false) => {}
            }
        }
        // The token changes, so which one counts is decided when it is needed.
        let credential = of(&self.token.file);
        if exists(&credential) {
            if exists(&self.token.file) {
                self.hidden.push(credential.clone());
            }
            self.token.credential = Some(credential);
        }
        self
    }

    /// Every file, to watch for changes.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let more = [&self.mesh].into_iter().chain(&self.hosts).chain(&self.elsewhere);
        self.env.iter().chain(&self.roots).chain(more).map(PathBuf::as_path).chain(self.token.paths())
    }
}

/// Whether there is something, as far as we can see: what we may not look at is told when it is read.
fn exists(path: &Path) -> bool {
    !path.symlink_metadata().is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// The bundles of this host by workload name, sorted: each directory in `/etc/we-agent` with at least one of the five
/// files (whatever it lacks is told when it is read) and each `<name>_cluster.env` in `credentials`, the directory of our
/// service's credentials; else Istio's own layout, else none. Hidden directories are passed over.
///
/// Whether Istio's layout may be used is the caller's decision: not while [`istio_agent`] finds Istio's own agent.
///
/// # Errors
/// When `/etc/we-agent` or `credentials` exists and cannot be listed.
pub fn find(root: &Root, credentials: Option<&Path>) -> io::Result<Vec<(String, BundleDir)>> {
    let mut found = BTreeMap::new();
    let mut put = |name: &str, place: &Path| {
        let mut files = BundleDir::directory(&root.path(OURS).join(name));
        if !is_dns_label(name) {
            files.bad_name = Some(Mistake { place: place.display().to_string(), problem: Problem::Name });
        }
        found.insert(name.to_owned(), files);
    };
    for (name, path) in names(&root.path(OURS))? {
        if path.is_dir() && !name.starts_with('.') && FILES.iter().any(|file| exists(&path.join(file))) {
            put(&name, &path);
        }
    }
    if let Some(dir) = credentials {
        for (id, path) in names(dir)? {
            if let Some(name) = id.strip_suffix(CREDENTIAL) {
                put(name, &path);
            }
        }
    }
    let with = |(name, files): (String, BundleDir)| match credentials {
        Some(dir) => (name.clone(), files.with_credentials(dir, &name)),
        None => (name, files),
    };
    let mut found: Vec<_> = found.into_iter().map(with).collect();
    let istio = BundleDir::istio(root);
    if found.is_empty() && istio.env.last().is_some_and(|file| file.exists()) {
        found.push((group(&istio).unwrap_or_else(|| UNNAMED.to_owned()), istio));
    }
    Ok(found)
}

/// What is in a directory; nothing if there is none.
fn names(dir: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    entries.map(|entry| entry.map(|e| (e.file_name().to_string_lossy().into_owned(), e.path()))).collect()
}

/// The WorkloadGroup that the environment files name, if it can name a workload here.
fn group(dir: &BundleDir) -> Option<String> {
    let mut env = Env::default();
    for path in &dir.env {
        let text = super::text(path, MAX_FILE, None).ok()?.unwrap_or_default();
        env = env::parse(path, &text, &env).ok()?;
    }
    env.get("ISTIO_META_AUTO_REGISTER_GROUP").filter(|name| is_dns_label(name)).map(str::to_owned)
}

/// Where the processes of Istio's service are listed: the one tree of control groups, or the older several.
const ISTIO_SERVICE: [&str; 2] = ["/sys/fs/cgroup/system.slice", "/sys/fs/cgroup/systemd/system.slice"];

/// The process id of Istio's own agent on this host, if it runs: two agents on one entry make it leak. An agent in a
/// container does not count: it is somebody else's sidecar.
///
/// Its service is told by its control group, for processes of others may be hidden (`ProtectProc=`).
pub fn istio_agent(root: &Root) -> Option<u32> {
    let listed = ISTIO_SERVICE.iter().find_map(|slice| {
        let list = read_text(&root.path(format!("{slice}/istio.service/cgroup.procs")), MAX_FILE).ok()?;
        list.lines().next()?.parse().ok()
    });
    if listed.is_some() {
        return listed;
    }
    let processes = fs::read_dir(root.path("/proc")).ok()?.flatten();
    let mut ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    ids.find(|id| {
        let read = |file: &str| {
            let read = read_text(&root.path(format!("/proc/{id}/{file}")), MAX_FILE);
            read.map(|text| text.to_string()).unwrap_or_default()
        };
        let contained = read("status").lines().any(|l| l.starts_with("NSpid:") && l.split_whitespace().count() > 2);
        let service = || read("cgroup").lines().any(|l| l.split('/').any(|part| part == "istio.service"));
        !contained && (read("comm").trim_end() == "pilot-agent" || service())
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path());
        for (path, text) in files {
            let path = root.path(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        (dir, root)
    }

    fn names(root: &Root) -> Vec<String> {
        find(root, None).unwrap().into_iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn each_directory_with_one_of_the_files_is_a_workload() {
        let (_dir, root) = host(&[
            ("/etc/we-agent/we-agent.yaml", ""),
            ("/etc/we-agent/b/cluster.env", ""),
            ("/etc/we-agent/a/istio-token", ""),
            ("/etc/we-agent/other/readme", ""),
            ("/etc/we-agent/.b.old/cluster.env", ""),
            ("/etc/we-agent/Bad_Name/hosts", ""),
            ("/var/lib/istio/envoy/cluster.env", "ISTIO_META_AUTO_REGISTER_GROUP=g"),
        ]);
        assert_eq!(names(&root), ["Bad_Name", "a", "b"]);
        let bad = &find(&root, None).unwrap()[0].1.bad_name;
        assert_eq!(bad.as_ref().unwrap().problem, Problem::Name);
    }

    #[test]
    fn credentials_stand_in_for_files_that_are_not_there() {
        let (_dir, root) = host(&[
            ("/etc/we-agent/a/cluster.env", ""),
            ("/etc/we-agent/a/istio-token", ""),
            ("/run/cred/a_cluster.env", ""),
            ("/run/cred/a_mesh.yaml", ""),
            ("/run/cred/a_istio-token", ""),
            ("/run/cred/b_cluster.env", ""),
            ("/run/cred/c_istio-token", ""),
            ("/run/cred/cluster.env", ""),
            ("/run/cred/Bad_Name_cluster.env", ""),
        ]);
        let credentials = root.path("/run/cred");
        let found = find(&root, Some(&credentials)).unwrap();
        let [(bad_name, bad), (a_name, a), (b_name, b)] = &found[..] else { panic!("{found:?}") };
        assert_eq!([bad_name, a_name, b_name], ["Bad_Name", "a", "b"], "a token alone makes no workload");
        assert!(bad.bad_name.is_some());
        let etc = |file: &str| root.path("/etc/we-agent").join(file);
        assert_eq!((&a.env[0], &a.mesh), (&etc("a/cluster.env"), &credentials.join("a_mesh.yaml")));
        assert_eq!(a.hidden, [credentials.join("a_cluster.env"), credentials.join("a_istio-token")]);
        assert_eq!(a.token.current(), etc("a/istio-token"));
        assert!(a.files().any(|file| file == etc("a/mesh.yaml")), "it may come later");
        fs::remove_file(etc("a/istio-token")).unwrap();
        assert_eq!(a.token.current(), credentials.join("a_istio-token"));
        assert_eq!((&b.env[0], &b.mesh), (&credentials.join("b_cluster.env"), &etc("b/mesh.yaml")));
        assert_eq!((b.token.current(), b.token.credential.as_ref()), (etc("b/istio-token").as_path(), None));
        assert_eq!(find(&root, Some(&root.path("/nowhere"))).unwrap().len(), 1);
    }

    #[test]
    fn istios_layout_is_the_fallback() {
        let cluster = "/var/lib/istio/envoy/cluster.env";
        assert_eq!(names(&host(&[]).1), Vec::<String>::new());
        assert_eq!(names(&host(&[(cluster, "ISTIO_META_AUTO_REGISTER_GROUP='payments'\n")]).1), ["payments"]);
        assert_eq!(names(&host(&[(cluster, "")]).1), ["istio"]);
        assert_eq!(names(&host(&[(cluster, "broken line\n")]).1), ["istio"]);
        assert_eq!(names(&host(&[(cluster, "ISTIO_META_AUTO_REGISTER_GROUP=a.b\n")]).1), ["istio"]);
        let sidecar = ("/var/lib/istio/envoy/sidecar.env", "ISTIO_META_AUTO_REGISTER_GROUP=side\n");
        let (_dir, root) = host(&[sidecar, (cluster, "")]);
        assert_eq!(names(&root), ["side"]);
    }

    #[test]
    fn istios_agent_is_found_outside_containers() {
        let (_dir, root) = host(&[
            ("/proc/1/comm", "systemd\n"),
            ("/proc/7/comm", "pilot-agent\n"),
            ("/proc/7/status", "Name:\tpilot-agent\nNSpid:\t7\t1\n"),
            ("/proc/self/comm", "pilot-agent\n"),
        ]);
        assert_eq!(istio_agent(&root), None);
        let (_dir, root) = host(&[("/proc/9/comm", "pilot-agent\n"), ("/proc/9/status", "NSpid:\t9\n")]);
        assert_eq!(istio_agent(&root), Some(9));
        let (_dir, root) = host(&[("/proc/8/comm", "envoy\n"), ("/proc/8/cgroup", "0::/system.slice/istio.service\n")]);
        assert_eq!(istio_agent(&root), Some(8));
    }

    #[test]
    fn istios_service_is_found_although_its_processes_are_hidden() {
        let procs = "/sys/fs/cgroup/system.slice/istio.service/cgroup.procs";
        let (_dir, root) = host(&[("/proc/1/comm", "we-agent\n"), (procs, "812\n814\n")]);
        assert_eq!(istio_agent(&root), Some(812));
        let (_dir, root) = host(&[("/proc/1/comm", "we-agent\n"), (procs, "")]);
        assert_eq!(istio_agent(&root), None);
    }
}
