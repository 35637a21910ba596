import com.launchdarkly.eventsource.ConnectStrategy;
import com.launchdarkly.eventsource.ErrorStrategy;
import com.launchdarkly.eventsource.EventSource;
import com.launchdarkly.eventsource.MessageEvent;
import com.launchdarkly.eventsource.RetryDelayStrategy;
import java.net.URI;
import java.util.Set;
import java.util.concurrent.TimeUnit;

/** Reads event streams to their final events, and writes each message as a line of JSON: Watch URL... */
public class Watch {
    private static final Set<String> FINAL_EVENTS = Set.of("complete", "job-completed");

    public static void main(String[] urls) throws InterruptedException {
        Thread[] threads = new Thread[urls.length];
        for (int i = 0; i < urls.length; i++) {
            String url = urls[i];
            threads[i] = new Thread(() -> watch(url));
            threads[i].start();
        }
        for (Thread thread : threads) thread.join();
    }

    private static void watch(String url) {
        // It also retries after 204, so its user closes it at the final event.
        EventSource.Builder builder = new EventSource.Builder(ConnectStrategy.http(URI.create(url)))
            .errorStrategy(ErrorStrategy.alwaysContinue())
            .retryDelay(10, TimeUnit.MILLISECONDS)
            .retryDelayStrategy(RetryDelayStrategy.defaultStrategy().backoffMultiplier(1));
        try (EventSource source = builder.build()) {
            for (MessageEvent message : source.messages()) {
                String event = message.getEventName();
                String data = message.getData();
                String id = message.getLastEventId();
                write(url, event, id == null ? "" : id, data);
                boolean isLast = FINAL_EVENTS.contains(event)
                    || event.equals("message") && data.contains("\"status\":\"completed\"");
                if (isLast) return;
            }
        }
    }

    private static void write(String url, String event, String id, String data) {
        String line = "{\"url\": %s, \"event\": %s, \"id\": %s, \"data\": %s}"
            .formatted(quote(url), quote(event), quote(id), quote(data));
        synchronized (Watch.class) {
            System.out.println(line);
        }
    }

    private static String quote(String text) {
        StringBuilder quoted = new StringBuilder("\"");
        for (char c : text.toCharArray()) {
            if (c == '"' || c == '\\') quoted.append('\\').append(c);
            else if (c < ' ' || c > '~') quoted.append("\\u%04x".formatted((int) c));
            else quoted.append(c);
        }
        return quoted.append('"').toString();
    }
}
