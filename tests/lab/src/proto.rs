//! The messages of the wire: generated from the `.proto` files beside this one, committed, kept fresh by a test.
#![allow(missing_docs, unreachable_pub, clippy::all)]

pub(crate) mod envoy {
    pub(crate) mod config {
        pub(crate) mod cluster {
            pub(crate) mod v3 {
                include!("proto/gen/envoy.config.cluster.v3.rs");
            }
        }
        pub(crate) mod core {
            pub(crate) mod v3 {
                include!("proto/gen/envoy.config.core.v3.rs");
            }
        }
        pub(crate) mod endpoint {
            pub(crate) mod v3 {
                include!("proto/gen/envoy.config.endpoint.v3.rs");
            }
        }
    }
    pub(crate) mod service {
        pub(crate) mod discovery {
            pub(crate) mod v3 {
                include!("proto/gen/envoy.service.discovery.v3.rs");
            }
        }
    }
}

pub(crate) mod google {
    pub(crate) mod rpc {
        include!("proto/gen/google.rpc.rs");
    }
}

pub(crate) mod istio {
    pub(crate) mod mesh {
        pub(crate) mod v1alpha1 {
            include!("proto/gen/istio.mesh.v1alpha1.rs");
        }
    }
    pub(crate) mod networking {
        pub(crate) mod nds {
            pub(crate) mod v1 {
                include!("proto/gen/istio.networking.nds.v1.rs");
            }
        }
    }
    pub(crate) mod v1 {
        pub(crate) mod auth {
            include!("proto/gen/istio.v1.auth.rs");
        }
    }
}
