/* The load generator: senders and readers on sockets that are already connected, in one thread and one epoll loop.
 *
 *   load PLAN        a plan is text, one item per line; `generator.py` writes it and documents the lines
 *
 * A message is a template with two holes, its number (seq) and the time it was sent (stamp); whatever a protocol needs
 * around it (WebSocket header and mask, NATS's PUB line, Socket.IO's event) is already there. So a frame costs a memcpy
 * here, and the generator does not limit the measurement. Every frame that arrives is compared with what was sent,
 * byte for byte, and must have the number that is due at that reader: a frame that is lost, duplicated, changed or out
 * of order ends the round with an error.
 *
 * Each stream has a window: the largest number of frames in flight, counted at its slowest reader. Without it, the
 * measurement would show how much a relay can buffer, if it drains its senders at once.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { WS, NATS };
enum { SATURATED, PACED, HOLD };

#define SCRATCH (1 << 20)
#define MAX_PIDS 16
#define MAX_EVENTS 256
/* Long enough for the work that a relay does after the reader has received the last frame. */
#define SETTLE_US 10000

typedef struct {
    uint64_t from; /* first seq it serves: a number takes more bytes as it grows */
    const uint8_t *wire, *ref;
    uint32_t wire_len, wire_seq, wire_stamp; /* the message that is sent, and its holes */
    uint32_t ref_len, ref_seq, ref_stamp;    /* the message that is received, and its holes */
    uint32_t seq_bytes;
    uint32_t mask; /* XORed over the holes; its four bytes are equal, so that their position does not matter */
} Variant;

typedef struct Conn Conn;

typedef struct {
    Conn *sender;
    Variant variants[5];
    int variant_count;
    int *readers, reader_count; /* those that count for the window */
    uint64_t first, total, window, interval_ns, next_due;
    uint64_t sent, acked, at_acked; /* acked: frames that its slowest reader has; at_acked: readers at that count */
    bool quiet;                     /* its latencies do not count */
} Stream;

struct Conn {
    int fd, kind, id;
    uint8_t *out; /* not sent yet: out[out_at .. out_end) */
    size_t out_at, out_end, out_room;
    uint8_t *rest; /* received, but not a complete message yet */
    size_t rest_len, rest_room;
    Stream *reads;
    uint64_t received;
    bool stalled, polled, want_write;
    Stream **sends;
    int send_count, send_room, turn;
};

static Conn *conns;
static int conn_count, conn_room;
static Stream *streams;
static int stream_count, stream_room;
static Conn **senders;
static int sender_count;
static int mode, poll_fd;
static uint64_t missing, deliveries, pongs, stalled_missing;
static uint32_t *latencies, *firsts; /* those of the first frame of a stream are separate */
static uint64_t latency_count, first_count;
static uint8_t *scratch;
static bool timed = true;
static char *others; /* JSON of the messages that are not frames, for the caller */
static size_t others_len, others_room;

static void fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    char words[1000];
    vsnprintf(words, sizeof words, format, args);
    va_end(args);
    for (char *at = words; *at; at++)
        if (*at == '"' || *at == '\\' || (unsigned char)*at < 32) *at = '.';
    printf("{\"error\": \"%s\"}\n", words);
    fflush(stdout);
    _exit(1);
}

static void *more(void *old, size_t size) {
    void *grown = realloc(old, size);
    if (!grown) fail("out of memory");
    return grown;
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint64_t cpu_ns_of(pid_t pid) {
    clockid_t clock;
    struct timespec now;
    int wrong = clock_getcpuclockid(pid, &clock);
    if (wrong || clock_gettime(clock, &now)) fail("process %d is gone", (int)pid);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint64_t own_cpu_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint64_t rss_kib_of(pid_t pid) {
    char path[64], line[256] = "";
    snprintf(path, sizeof path, "/proc/%d/statm", (int)pid);
    FILE *file = fopen(path, "r");
    if (!file) fail("process %d is gone", (int)pid);
    uint64_t size = 0, resident = 0;
    if (fgets(line, sizeof line, file)) sscanf(line, "%" SCNu64 " %" SCNu64, &size, &resident);
    fclose(file);
    return resident * (uint64_t)sysconf(_SC_PAGESIZE) / 1024;
}

/* -- other messages --------------------------------------------------------------------------------------------- */

static void tell(const Conn *conn, const char *what, const uint8_t *data, size_t size) {
    size_t need = others_len + 2 * size + 100;
    if (need > (64u << 20)) fail("connection %d: too much that is no frame", conn->id);
    if (need > others_room) others = more(others, others_room = 2 * need);
    others_len += (size_t)sprintf(others + others_len, "%s{\"conn\": %d, \"is\": \"%s\", \"hex\": \"",
                                  others_len ? ", " : "", conn->id, what);
    for (size_t at = 0; at < size; at++) others_len += (size_t)sprintf(others + others_len, "%02x", data[at]);
    others_len += (size_t)sprintf(others + others_len, "\"}");
}

/* -- sending ---------------------------------------------------------------------------------------------------- */

static void poll_for(Conn *conn, bool write) {
    struct epoll_event event = {.events = (conn->stalled ? 0u : EPOLLIN) | (write ? EPOLLOUT : 0u), .data.ptr = conn};
    if (conn->polled && conn->want_write == write) return;
    if (epoll_ctl(poll_fd, conn->polled ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, conn->fd, &event))
        fail("epoll_ctl: %s", strerror(errno));
    conn->polled = true;
    conn->want_write = write;
}

static void flush(Conn *conn) {
    while (conn->out_at < conn->out_end) {
        ssize_t sent = send(conn->fd, conn->out + conn->out_at, conn->out_end - conn->out_at, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EINTR) continue;
            if (errno != EAGAIN && errno != EWOULDBLOCK) fail("connection %d: send: %s", conn->id, strerror(errno));
            poll_for(conn, true);
            return;
        }
        conn->out_at += (size_t)sent;
    }
    conn->out_at = conn->out_end = 0;
    poll_for(conn, false);
}

static uint8_t *room_for(Conn *conn, size_t size) {
    if (conn->out_end + size > conn->out_room) {
        conn->out_room = 2 * (conn->out_end + size);
        conn->out = more(conn->out, conn->out_room);
    }
    uint8_t *place = conn->out + conn->out_end;
    conn->out_end += size;
    return place;
}

static const Variant *variant_of(const Stream *stream, uint64_t seq) {
    int at = stream->variant_count - 1;
    while (at > 0 && stream->variants[at].from > seq) at--;
    return &stream->variants[at];
}

static void put(uint8_t *place, uint64_t value, uint32_t size, uint32_t mask) {
    for (uint32_t at = 0; at < size; at++) place[at] = (uint8_t)(value >> 8 * (size - 1 - at)) ^ (uint8_t)mask;
}

static uint64_t get(const uint8_t *place, uint32_t size) {
    uint64_t value = 0;
    for (uint32_t at = 0; at < size; at++) value = value << 8 | place[at];
    return value;
}

static void pack(Stream *stream) {
    uint64_t seq = stream->first + stream->sent++;
    const Variant *variant = variant_of(stream, seq);
    uint8_t *place = room_for(stream->sender, variant->wire_len);
    memcpy(place, variant->wire, variant->wire_len);
    put(place + variant->wire_seq, seq, variant->seq_bytes, variant->mask);
    put(place + variant->wire_stamp, now_ns(), 8, variant->mask);
}

static uint64_t credit(const Stream *stream) {
    uint64_t left = stream->total - stream->sent;
    if (!stream->window) return left;
    uint64_t used = stream->sent - stream->acked;
    uint64_t room = used < stream->window ? stream->window - used : 0;
    return room < left ? room : left;
}

/* Send a burst of a sender, its streams in turn; true if it could send more at once. It waits for several frames, so
 * that a single credit that comes back does not cost a system call. */
static bool feed(Conn *conn, uint64_t burst_bytes, uint64_t least) {
    if (conn->out_at < conn->out_end) return false;
    uint64_t ready = 0, left = 0;
    for (int at = 0; at < conn->send_count; at++) {
        ready += credit(conn->sends[at]);
        left += conn->sends[at]->total - conn->sends[at]->sent;
    }
    if (!ready || ready < (left < least ? left : least)) return false;
    uint64_t put_in = 0;
    while (ready && put_in < burst_bytes) {
        Stream *stream = conn->sends[conn->turn];
        conn->turn = (conn->turn + 1) % conn->send_count;
        if (!credit(stream)) continue;
        size_t before = conn->out_end;
        pack(stream);
        put_in += conn->out_end - before;
        ready--;
    }
    flush(conn);
    return conn->out_at == conn->out_end && ready >= least;
}

/* -- receiving -------------------------------------------------------------------------------------------------- */

static void acknowledge(Stream *stream, uint64_t before) {
    if (before != stream->acked || --stream->at_acked) return;
    uint64_t least = UINT64_MAX;
    for (int at = 0; at < stream->reader_count; at++) {
        uint64_t has = conns[stream->readers[at]].received;
        if (has < least) least = has, stream->at_acked = 0;
        if (has == least) stream->at_acked++;
    }
    stream->acked = least;
}

static void deliver(Conn *conn, const uint8_t *data, size_t size, uint64_t now) {
    Stream *stream = conn->reads;
    if (!stream || size + 16 < stream->variants[0].ref_len) {
        tell(conn, "message", data, size);
        return;
    }
    uint64_t seq = stream->first + conn->received;
    const Variant *variant = variant_of(stream, seq);
    if (size != variant->ref_len || memcmp(data, variant->ref, variant->ref_seq))
        fail("connection %d: %zu bytes that are not frame %" PRIu64 " of %u bytes", conn->id, size, seq,
             variant->ref_len);
    uint64_t got = get(data + variant->ref_seq, variant->seq_bytes);
    if (got != seq) fail("connection %d: frame %" PRIu64 " in place of %" PRIu64, conn->id, got, seq);
    if (conn->received >= stream->total) fail("connection %d: frame %" PRIu64 " was never sent", conn->id, seq);
    uint32_t middle = variant->ref_seq + variant->seq_bytes, after = variant->ref_stamp + 8;
    if (memcmp(data + middle, variant->ref + middle, variant->ref_stamp - middle) ||
        memcmp(data + after, variant->ref + after, variant->ref_len - after))
        fail("connection %d: frame %" PRIu64 " is damaged", conn->id, seq);
    uint64_t before = conn->received++;
    if (conn->stalled || !timed) {
        stalled_missing--;
        return;
    }
    acknowledge(stream, before);
    missing--;
    if (!stream->quiet) {
        uint64_t took = now - get(data + variant->ref_stamp, 8);
        uint32_t kept = took > UINT32_MAX ? UINT32_MAX : (uint32_t)took;
        if (before) latencies[latency_count++] = kept;
        else firsts[first_count++] = kept;
    }
}

static void pong(Conn *conn, const uint8_t *data, size_t size) {
    uint8_t *place = room_for(conn, 6 + size);
    place[0] = 0x8a, place[1] = 0x80 | (uint8_t)size;
    memset(place + 2, 0, 4); /* a key of zeros masks nothing */
    memcpy(place + 6, data, size);
    pongs++;
    if (!conn->want_write) flush(conn);
}

/* Returns the number of bytes used; the rest is an incomplete message. */
static size_t parse_ws(Conn *conn, const uint8_t *data, size_t size, uint64_t now) {
    size_t at = 0;
    while (size - at >= 2) {
        size_t begin = at + 2;
        uint64_t length = data[at + 1];
        if (length > 127) fail("connection %d: a masked frame from a server", conn->id);
        if (length == 126) {
            if (size - at < 4) break;
            length = get(data + begin, 2), begin += 2;
        } else if (length == 127) {
            if (size - at < 10) break;
            length = get(data + begin, 8), begin += 8;
        }
        if (length > size - begin || begin > size) break;
        const uint8_t *payload = data + begin;
        switch (data[at]) {
        case 0x82: deliver(conn, payload, length, now); break;
        case 0x89: pong(conn, payload, length); break;
        case 0x8a: break;
        case 0x81:
            if (length == 1 && *payload == '2') { /* Engine.IO's ping, which is a text message */
                static const uint8_t answer[] = {0x81, 0x81, 0, 0, 0, 0, '3'};
                memcpy(room_for(conn, sizeof answer), answer, sizeof answer);
                pongs++;
                if (!conn->want_write) flush(conn);
            } else if (!conn->reads) {
                tell(conn, "text", payload, length);
            } /* else the text that Socket.IO puts before each binary message */
            break;
        case 0x88: fail("connection %d: closed by the relay: %.*s", conn->id, (int)length, (const char *)payload); break;
        default: fail("connection %d: an unexpected WebSocket frame: %#x", conn->id, data[at]);
        }
        at = begin + length;
    }
    return at;
}

static size_t parse_nats(Conn *conn, const uint8_t *data, size_t size, uint64_t now) {
    size_t at = 0;
    for (;;) {
        const uint8_t *end = memchr(data + at, '\r', size - at);
        if (!end || (size_t)(end - data) + 2 > size) return at;
        size_t line = (size_t)(end - data) - at, body = (size_t)(end - data) + 2;
        if (line > 4 && !memcmp(data + at, "MSG ", 4)) {
            const uint8_t *number = end;
            while (number[-1] != ' ') number--;
            size_t length = strtoul((const char *)number, NULL, 10);
            if (size - body < length + 2) return at;
            deliver(conn, data + body, length, now);
            body += length + 2;
        } else if (line == 4 && !memcmp(data + at, "PING", 4)) {
            memcpy(room_for(conn, 6), "PONG\r\n", 6);
            pongs++;
            if (!conn->want_write) flush(conn);
        } else if (line >= 4 && !memcmp(data + at, "-ERR", 4)) {
            fail("connection %d: %.*s", conn->id, (int)line, (const char *)data + at);
        }
        at = body;
    }
}

static void take(Conn *conn) {
    if (conn->rest_len) memcpy(scratch, conn->rest, conn->rest_len);
    ssize_t count = recv(conn->fd, scratch + conn->rest_len, SCRATCH - conn->rest_len, 0);
    if (count < 0) {
        if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) return;
        fail("connection %d: recv: %s", conn->id, strerror(errno));
    }
    if (!count) fail("connection %d: the relay hung up", conn->id);
    size_t size = conn->rest_len + (size_t)count;
    size_t used = (conn->kind == NATS ? parse_nats : parse_ws)(conn, scratch, size, now_ns());
    conn->rest_len = size - used;
    if (!conn->rest_len) return;
    if (conn->rest_len == SCRATCH) fail("connection %d: a message of over %d bytes", conn->id, SCRATCH);
    if (conn->rest_len > conn->rest_room) {
        conn->rest_room = conn->rest_len + 65536;
        conn->rest = more(conn->rest, conn->rest_room);
    }
    memcpy(conn->rest, scratch + used, conn->rest_len);
}

/* -- the plan --------------------------------------------------------------------------------------------------- */

static uint64_t timeout_ns = 60000000000u, lead_ns, burst_bytes = 65536, least = 8;
static pid_t pids[MAX_PIDS];
static int pid_count;
static const uint8_t *blob;

static void read_plan(const char *path) {
    FILE *file = fopen(path, "r");
    if (!file) fail("%s: %s", path, strerror(errno));
    char line[4096], word[32], text[4000];
    while (fgets(line, sizeof line, file)) {
        int skip = 0;
        if (sscanf(line, "%31s %n", word, &skip) != 1) continue;
        const char *rest = line + skip;
        uint64_t n[12] = {0};
        int fields = sscanf(rest, "%" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64
                           " %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64,
                           n, n + 1, n + 2, n + 3, n + 4, n + 5, n + 6, n + 7, n + 8, n + 9, n + 10, n + 11);
        if (!strcmp(word, "blob") && sscanf(rest, "%3999s", text) == 1) {
            int fd = open(text, O_RDONLY);
            struct stat about;
            if (fd < 0 || fstat(fd, &about)) fail("%s: %s", text, strerror(errno));
            if (about.st_size) {
                blob = mmap(NULL, (size_t)about.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0);
                if (blob == MAP_FAILED) fail("mmap: %s", strerror(errno));
            }
            close(fd);
        } else if (!strcmp(word, "mode")) mode = (int)n[0];
        else if (!strcmp(word, "timeout_ms")) timeout_ns = n[0] * 1000000;
        else if (!strcmp(word, "lead_ns")) lead_ns = n[0];
        else if (!strcmp(word, "ready")) putchar('\n'), fflush(stdout);
        else if (!strcmp(word, "burst")) burst_bytes = n[0], least = n[1];
        else if (!strcmp(word, "pid") && pid_count < MAX_PIDS) pids[pid_count++] = (pid_t)n[0];
        else if (!strcmp(word, "conns")) conns = more(conns, sizeof(Conn) * (size_t)(conn_room = (int)n[0]));
        else if (!strcmp(word, "streams")) streams = more(streams, sizeof(Stream) * (size_t)(stream_room = (int)n[0]));
        else if (!strcmp(word, "conn") && fields == 2 && conn_count < conn_room) {
            conns[conn_count] = (Conn){.fd = (int)n[0], .kind = (int)n[1], .id = conn_count};
            conn_count++;
        } else if (!strcmp(word, "stream") && fields == 7 && stream_count < stream_room && n[0] < (uint64_t)conn_count) {
            Stream *stream = &streams[stream_count++];
            Conn *sender = &conns[n[0]];
            *stream = (Stream){.sender = sender, .first = n[1], .total = n[2], .interval_ns = n[3], .next_due = n[4],
                               .window = n[5], .quiet = n[6]};
            if (sender->send_count == sender->send_room) {
                sender->send_room = 2 * sender->send_room + 4;
                sender->sends = more(sender->sends, sizeof(Stream *) * (size_t)sender->send_room);
            }
            sender->sends[sender->send_count++] = stream;
        } else if (!strcmp(word, "variant") && fields == 11 && stream_count && streams[stream_count - 1].variant_count < 5) {
            Stream *stream = &streams[stream_count - 1];
            stream->variants[stream->variant_count++] = (Variant){
                .from = n[0], .seq_bytes = (uint32_t)n[1], .mask = (uint32_t)n[2],
                .wire = blob + n[3], .wire_len = (uint32_t)n[4], .wire_seq = (uint32_t)n[5], .wire_stamp = (uint32_t)n[6],
                .ref = blob + n[7], .ref_len = (uint32_t)n[8], .ref_seq = (uint32_t)n[9], .ref_stamp = (uint32_t)n[10]};
        } else if (!strcmp(word, "reader") && fields == 2 && stream_count && n[0] < (uint64_t)conn_count) {
            Stream *stream = &streams[stream_count - 1];
            Conn *conn = &conns[n[0]];
            conn->reads = stream;
            conn->stalled = n[1];
            if (conn->stalled) {
                stalled_missing += stream->total;
                continue;
            }
            stream->readers = more(stream->readers, sizeof(int) * (size_t)(stream->reader_count + 1));
            stream->readers[stream->reader_count++] = conn->id;
            stream->at_acked++;
            missing += stream->total;
            if (!stream->quiet) deliveries += stream->total;
        } else fail("not a line of a plan: %s", line);
    }
    fclose(file);
    senders = more(NULL, sizeof(Conn *) * (size_t)(conn_count + 1));
    for (int at = 0; at < conn_count; at++)
        if (conns[at].send_count) senders[sender_count++] = &conns[at];
    latencies = more(NULL, sizeof(uint32_t) * (deliveries + 1));
    memset(latencies, 0, sizeof(uint32_t) * (deliveries + 1)); /* touch its pages now, not in the round */
    firsts = more(NULL, sizeof(uint32_t) * (size_t)(conn_count + 1));
}

/* -- the round -------------------------------------------------------------------------------------------------- */

static int by_size(const void *a, const void *b) {
    uint32_t left = *(const uint32_t *)a, right = *(const uint32_t *)b;
    return (left > right) - (left < right);
}

static double quantile_us(const uint32_t *sorted, uint64_t size, double part) {
    if (!size) return 0;
    uint64_t at = (uint64_t)(part * (double)size);
    return sorted[at < size ? at : size - 1] / 1e3;
}

static int timer_fd;

static uint64_t send_due(void) {
    for (;;) {
        Stream *next = NULL;
        for (int at = 0; at < stream_count; at++) {
            Stream *stream = &streams[at];
            if (stream->sent < stream->total && (!next || stream->next_due < next->next_due)) next = stream;
        }
        if (!next || next->next_due > now_ns()) return next ? next->next_due : 0;
        pack(next);
        next->next_due += next->interval_ns;
        if (!next->sender->want_write) flush(next->sender);
    }
}

static int turn(int wait_ms) {
    struct epoll_event events[MAX_EVENTS];
    int count = epoll_wait(poll_fd, events, MAX_EVENTS, wait_ms);
    if (count < 0 && errno != EINTR) fail("epoll_wait: %s", strerror(errno));
    for (int at = 0; at < count; at++) {
        Conn *conn = events[at].data.ptr;
        if (!conn) {
            uint64_t times;
            if (read(timer_fd, &times, sizeof times) < 0 && errno != EAGAIN) fail("timer: %s", strerror(errno));
            continue;
        }
        if (events[at].events & EPOLLOUT) flush(conn);
        if (events[at].events & ~(unsigned)EPOLLOUT && !conn->stalled) take(conn);
    }
    return count;
}

static void saturate(uint64_t deadline) {
    while (missing) {
        bool again = false;
        for (int at = 0; at < sender_count; at++) again |= feed(senders[at], burst_bytes, least);
        turn(again ? 0 : 100);
        if (now_ns() > deadline) return;
    }
}

static uint64_t frames, began, own, cpu[MAX_PIDS];

/* The measurement starts here. */
static void start(void) {
    frames = missing;
    for (int at = 0; at < pid_count; at++) cpu[at] = cpu_ns_of(pids[at]);
    own = own_cpu_ns();
    began = now_ns();
}

static void pace(uint64_t deadline) {
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN};
    if (timer_fd < 0 || epoll_ctl(poll_fd, EPOLL_CTL_ADD, timer_fd, &event)) fail("timer: %s", strerror(errno));
    for (int at = 0; at < stream_count; at++) streams[at].next_due += began;
    uint64_t armed = 0, leads_until = lead_ns ? began + lead_ns : 0;
    while (missing) {
        if (leads_until && now_ns() >= leads_until) leads_until = 0, start();
        uint64_t due = send_due();
        if (due && due != armed) {
            struct itimerspec when = {.it_value = {(time_t)(due / 1000000000u), (long)(due % 1000000000u)}};
            timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &when, NULL);
            armed = due;
        }
        turn(100);
        if (now_ns() > deadline) return;
    }
    close(timer_fd);
}

static volatile sig_atomic_t stopped;

static void stop(int number) { stopped = number; }

int main(int count, char **words) {
    if (count != 2) fail("usage: load PLAN");
    scratch = more(NULL, SCRATCH);
    memset(scratch, 0, SCRATCH);
    read_plan(words[1]);
    poll_fd = epoll_create1(EPOLL_CLOEXEC);
    for (int at = 0; at < conn_count; at++) {
        fcntl(conns[at].fd, F_SETFL, fcntl(conns[at].fd, F_GETFL) | O_NONBLOCK);
        if (!conns[at].stalled) poll_for(&conns[at], false);
    }
    signal(SIGTERM, stop);
    uint64_t rss[MAX_PIDS];
    start();
    uint64_t deadline = began + timeout_ns;
    if (mode == SATURATED) saturate(deadline);
    else if (mode == PACED) pace(deadline);
    else
        while (!stopped) turn(100);
    uint64_t ended = now_ns();
    own = own_cpu_ns() - own;
    if (missing) fail("%" PRIu64 " of %" PRIu64 " frames did not come within %.0f s", missing, frames, timeout_ns / 1e9);
    usleep(SETTLE_US);
    for (int at = 0; at < pid_count; at++) cpu[at] = cpu_ns_of(pids[at]) - cpu[at], rss[at] = rss_kib_of(pids[at]);
    for (int more = 10; more && turn(0) > 0; more--) continue; /* a surplus frame would arrive now */
    uint64_t stood = stalled_missing;
    timed = false;
    for (int at = 0; at < conn_count; at++)
        if (conns[at].stalled) conns[at].stalled = false, poll_for(&conns[at], false);
    for (deadline = now_ns() + timeout_ns; stalled_missing && now_ns() < deadline;) turn(100);
    if (stalled_missing) fail("%" PRIu64 " frames of a stalled reader never came", stalled_missing);
    for (int at = 0; at < conn_count; at++) {
        if (conns[at].out_at < conns[at].out_end) fail("connection %d: not all was sent", at);
        if (conns[at].rest_len) tell(&conns[at], "rest", conns[at].rest, conns[at].rest_len);
    }
    qsort(latencies, latency_count, sizeof(uint32_t), by_size);
    qsort(firsts, first_count, sizeof(uint32_t), by_size);
    printf("{\"frames\": %" PRIu64 ", \"wall_s\": %.9f, \"load_cpu_s\": %.9f, \"pongs\": %" PRIu64
           ", \"stalled_frames\": %" PRIu64,
           frames, (double)(ended - began) / 1e9, (double)own / 1e9, pongs, stood);
    printf(", \"p50_us\": %.1f, \"p99_us\": %.1f, \"first_p50_us\": %.1f", quantile_us(latencies, latency_count, 0.5),
           quantile_us(latencies, latency_count, 0.99), quantile_us(firsts, first_count, 0.5));
    printf(", \"cpu_s\": [");
    for (int at = 0; at < pid_count; at++) printf("%s%.9f", at ? ", " : "", (double)cpu[at] / 1e9);
    printf("], \"rss_kib\": [");
    for (int at = 0; at < pid_count; at++) printf("%s%" PRIu64, at ? ", " : "", rss[at]);
    printf("], \"others\": [%s]}\n", others_len ? others : "");
    return 0;
}
