// A Java program that makes its TLS context of our PKCS#12 as the README shows it, and speaks mutual TLS with itself. Prints
// who each side found at the other end.
import java.io.File;
import java.net.InetAddress;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.KeyStore;
import java.security.cert.X509Certificate;
import java.util.concurrent.CompletableFuture;
import javax.net.ssl.*;

class Handshake {
    static String peer(SSLSocket socket) {
        try (socket) {
            socket.startHandshake();
            // In TLS 1.3 the client is done before the server has looked at its certificate: a byte each way.
            socket.getOutputStream().write(1);
            if (socket.getInputStream().read() != 1) throw new Exception("closed");
            var leaf = (X509Certificate) socket.getSession().getPeerCertificates()[0];
            return leaf.getSubjectAlternativeNames().iterator().next().get(1).toString();
        } catch (Exception e) {
            return e.toString();
        }
    }

    public static void main(String[] arguments) throws Exception {
        /* README */
        var loopback = InetAddress.getLoopbackAddress();
        var listener = (SSLServerSocket) tls.getServerSocketFactory().createServerSocket(0, 1, loopback);
        listener.setNeedClientAuth(true);
        var server = CompletableFuture.supplyAsync(() -> {
            try {
                return peer((SSLSocket) listener.accept());
            } catch (Exception e) {
                return e.toString();
            }
        });
        System.out.println(peer((SSLSocket) tls.getSocketFactory().createSocket(loopback, listener.getLocalPort())));
        System.out.println(server.get());
    }
}
